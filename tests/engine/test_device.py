"""The code path of a device, run on a CPU by the backend sdpa: equal tokens, plans, clear refusals."""

import ctypes
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.backends import BACKENDS, choose_backend
from quire.config import EngineConfig
from quire.engine import device as devices
from quire.engine.device import Device, ThreadCount, find_device, probe_cpu, probe_cuda, usable_cores
from quire.engine.memory_budget import CONTEXT_BYTES
from quire.engine.memory_plan import plan_memory
from quire.errors import ConfigError, MemoryPlanError
from quire.kernels import cpu
from quire.model_config import ModelConfig, RopeConfig
from quire.models.device_weights import Upload
from tests.checkpoints import make_checkpoint, reference_model
from tests.engine.test_parity import NUM_STEPS, assert_greedy, make_prompts

GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS, ignore_eos=True)
CARD = Device("cuda", "a card", 80 * 2**30, (9, 0))
OLD_CARD = Device("cuda", "an old card", 32 * 2**30, (7, 0))

FAMILIES = [
    "llama",
    "gpt2",
    "stablelm-parallel",
    "gemma2",
    "mixtral",
    "glm4-moe",
    "phi3-longrope",
    "falcon-new",
    "bloom",
]
"""One for each kind of layer; `test_parity_table` has all families."""


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, family)
    options = {"attention_backend": "sdpa", "threads": 1, "max_num_seqs": 20}
    llm = LLM(str(checkpoint), num_blocks=160, max_num_batched_tokens=40, **options)
    oracle = reference_model(checkpoint)
    prompts = make_prompts(9, longest=100)
    assert llm.stats().block_size == 64
    assert_greedy(oracle, llm.generate(prompts, GREEDY))
    again = llm.generate(prompts, GREEDY)
    assert_greedy(oracle, again)
    assert any(output.num_cached_tokens for output in again)
    small = LLM(str(checkpoint), block_size=16, num_blocks=24, max_model_len=240, **options)
    assert_greedy(oracle, small.generate(prompts, GREEDY))
    assert small.stats().total_preemptions > 0


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_activations_of_sixteen_bits(kv_cache_dtype: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "qwen3", dtype="bfloat16")
    llm = LLM(str(checkpoint), attention_backend="sdpa", kv_cache_dtype=kv_cache_dtype, num_blocks=40, threads=1)
    core: Any = llm._engine._core  # the stored type is not shown elsewhere
    assert core._executor._kv_cache.layers[0].keys.dtype == (
        torch.float8_e4m3fn if kv_cache_dtype == "fp8" else torch.bfloat16
    )
    prompt = make_prompts(4, longest=60)[3]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([prompt], params)
    with torch.inference_mode():
        expected = reference_model(checkpoint)(torch.tensor([prompt])).logits[0].log_softmax(-1)
    found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    wanted = expected[range(len(prompt) - 1), prompt[1:]]
    # The loss of precision of 16-bit activations, and of 8-bit KV.
    assert (torch.tensor(found) - wanted).abs().mean() < (0.3 if kv_cache_dtype == "fp8" else 0.1)


# Choosing


def test_the_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.importlib.metadata, "version", lambda name: "2.13.0")
    assert find_device("auto", probe=lambda: CARD) is CARD
    assert find_device("cuda", probe=lambda: CARD) is CARD
    assert find_device("cpu", probe=lambda: CARD).type == "cpu"
    assert find_device("auto", probe=lambda: None).type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ConfigError, match=r"shows no CUDA device .CUDA_VISIBLE_DEVICES is '7'.; choose cpu or auto"):
        find_device("cuda", probe=lambda: None)
    monkeypatch.setattr(devices.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert find_device("auto", probe=lambda: CARD).type == "cpu"
    with pytest.raises(ConfigError, match=r"torch 2.13.0\+cpu is built without CUDA"):
        find_device("cuda", probe=lambda: CARD)


class FakeDriver:
    """The calls of libcuda that Quire uses, with one card or none."""

    def __init__(self, count: int, *, init: int = 0) -> None:
        self.count, self.init = count, init

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, handle: Any, ordinal: int) -> int:
        handle._obj.value = 17
        return 0

    def cuDeviceGetName(self, name: Any, size: int, handle: ctypes.c_int) -> int:
        assert handle.value == 17
        name.value = b"Card X"
        return 0

    def cuDeviceTotalMem_v2(self, total: Any, handle: ctypes.c_int) -> int:
        total._obj.value = 80 * 2**30
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: ctypes.c_int) -> int:
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0


def test_what_the_driver_says() -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    assert probe_cuda(missing) is None
    assert probe_cuda(lambda name: FakeDriver(0)) is None
    assert probe_cuda(lambda name: FakeDriver(1, init=100)) is None
    assert probe_cuda(lambda name: FakeDriver(1)) == Device("cuda", "Card X", 80 * 2**30, (9, 0))


def test_backends_of_devices() -> None:
    assert choose_backend("auto", "cpu") == "cpu"
    assert choose_backend("sdpa", "cpu") == "sdpa"
    assert choose_backend("auto", "mps") == "sdpa"
    assert choose_backend("auto", "cuda", (6, 1)) == "sdpa"
    assert choose_backend("auto", "cuda", (9, 0), lambda package: True) == "triton"
    assert choose_backend("auto", "cuda", (9, 0), lambda package: False) == "sdpa"
    for kind in ("attention sinks", "latent attention"):
        assert choose_backend("auto", "cuda", (9, 0), lambda package: True, needs=(kind,)) == "sdpa"
        with pytest.raises(ConfigError, match=f"triton, which does not compute {kind}, which this model has; choose s"):
            choose_backend("triton", "cuda", (9, 0), lambda package: True, needs=(kind,))
    with pytest.raises(ConfigError, match="attention_backend is cpu, which runs on cpu, but device is cuda; choose"):
        choose_backend("cpu", "cuda", (9, 0))
    with pytest.raises(ConfigError, match=r"triton, which needs .* capability 8.0, but .* 7.5; choose sdpa"):
        choose_backend("triton", "cuda", (7, 5), lambda package: True)
    with pytest.raises(ConfigError, match=r"triton, which needs the package triton, .* choose sdpa"):
        choose_backend("triton", "cuda", (9, 0), lambda package: False)
    with pytest.raises(ConfigError, match="triton, which runs on cuda, but device is cpu; choose cpu or sdpa"):
        choose_backend("triton", "cpu")
    for name in BACKENDS:
        EngineConfig(attention_backend=name)
    with pytest.raises(ConfigError, match=r"attention_backend is 'magic'; it must be one of auto, cpu"):
        EngineConfig(attention_backend="magic")
    with pytest.raises(ConfigError, match="device is 'tpu'; it must be one of auto, cpu, cuda, mps"):
        EngineConfig(device="tpu")
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization is 1.5; it must be above 0 and at most 1"):
        EngineConfig(gpu_memory_utilization=1.5)


# Memory


@pytest.fixture(scope="module")
def llama_8b() -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131_072,
        rope=RopeConfig(),
        layer_windows=(0,) * 32,
        checkpoint_dtype="bfloat16",
    )


def test_a_card_is_planned_from_its_size(llama_8b: ModelConfig) -> None:
    plan = plan_memory(EngineConfig(max_model_len=32_768), llama_8b, device=CARD)
    assert (plan.device, plan.dtype, plan.block_size) == ("cuda", "bfloat16", 64)
    assert plan.available == int(80 * 2**30 * 0.9)
    assert plan.weights == pytest.approx(16.06e9, rel=0.01)
    assert plan.context == CONTEXT_BYTES
    assert plan.kv_bytes_per_token == 128 * 1024
    left = plan.available - plan.weights - plan.activations - plan.logprobs - plan.context - plan.graphs
    assert plan.kv_cache <= left < plan.kv_cache + 64 * plan.kv_bytes_per_token
    assert plan.total <= plan.available
    text = "\n".join(plan.describe())
    assert "device: a card" in text
    assert "CUDA context" in text
    eager = plan_memory(EngineConfig(max_model_len=32_768, enforce_eager=True), llama_8b, device=CARD)
    assert eager.graphs == 0
    assert plan_memory(EngineConfig(kv_cache_dtype="fp8"), llama_8b, device=CARD).kv_bytes_per_token == 64 * 1024


def test_tiers_of_a_card_are_the_hosts(llama_8b: ModelConfig) -> None:
    plan = plan_memory(EngineConfig(swap_space=64 * 2**30), llama_8b, 100 * 2**30, device=CARD)
    assert plan.total <= plan.available
    assert plan.swap_space == 64 * 2**30
    with pytest.raises(MemoryPlanError, match=r"take 64 GiB of the host's memory, of which 32 GiB is available"):
        plan_memory(EngineConfig(swap_space=64 * 2**30), llama_8b, 32 * 2**30, device=CARD)


def test_what_a_card_cannot_do_is_refused(llama_8b: ModelConfig) -> None:
    with pytest.raises(MemoryPlanError, match=r"CUDA context .* gpu_memory_utilization 0.2 of 80 GiB"):
        plan_memory(EngineConfig(gpu_memory_utilization=0.2), llama_8b, device=CARD)
    with pytest.raises(ConfigError, match=r"quantization is int8, but the .* backend has no layers of few bits"):
        plan_memory(EngineConfig(quantization="int8"), llama_8b, device=CARD)
    with pytest.raises(ConfigError, match=r"deterministic is asked for, but .* attention_backend cpu"):
        plan_memory(EngineConfig(deterministic=True), llama_8b, device=CARD)
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is fp8_e4m3, which the cpu backend cannot store"):
        plan_memory(EngineConfig(kv_cache_dtype="fp8_e4m3", device="cpu"), llama_8b, 2**40)
    # Cards before Ampere have no bfloat16, and the kernels that need more than they are do not run there.
    plan = plan_memory(EngineConfig(max_model_len=1024), llama_8b, device=OLD_CARD)
    assert (plan.dtype, plan.attention_backend) == ("float16", "sdpa")


def test_float8_needs_a_card_that_has_it(llama_8b: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = replace(CARD, capability=(8, 0))
    config = EngineConfig(kv_cache_dtype="fp8")
    monkeypatch.setattr("quire.engine.memory_plan.choose_backend", lambda *_, **__: "sdpa")
    assert plan_memory(config, llama_8b, device=ampere).kv_cache_dtype == "fp8_e4m3"
    monkeypatch.setattr("quire.engine.memory_plan.choose_backend", lambda *_, **__: "triton")
    assert plan_memory(config, llama_8b, device=CARD).kv_cache_dtype == "fp8_e4m3"
    with pytest.raises(ConfigError, match=r"fp8_e4m3, for which the triton backend needs .* 8.9, but this one has 8.0"):
        plan_memory(config, llama_8b, device=ampere)


def test_a_backends_workspace_is_in_the_plan(llama_8b: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.engine.memory_plan.choose_backend", lambda *_, **__: "triton")
    plan = plan_memory(EngineConfig(), llama_8b, device=CARD)
    rows = {**BACKENDS, "triton": replace(BACKENDS["triton"], workspace=BACKENDS["triton"].workspace + 2**25)}
    monkeypatch.setattr("quire.engine.memory_budget.BACKENDS", rows)
    assert plan_memory(EngineConfig(), llama_8b, device=CARD).activations - plan.activations == 2**25


# Weights


def test_tensors_pass_through_staging_in_pieces() -> None:
    upload = Upload(torch.device("cpu"), staging_bytes=56)
    for tensor in (
        torch.randn(7, 9),
        torch.randn(100).bfloat16(),
        torch.randn(0, 3),
        torch.randn(6, 5).t(),
        torch.ones(1),
    ):
        copy = upload(tensor)
        assert torch.equal(copy, tensor)
        assert copy.dtype == tensor.dtype
        assert not copy.numel() or copy.data_ptr() != tensor.data_ptr()


# The CPU


def test_what_the_plan_takes_a_cpu_for_is_what_the_kernels_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUIRE_CPU_ISA", raising=False)
    assert probe_cpu().multiplies_bfloat16 == (cpu.supported_isas()[0] == "avx512bf16")
    cpuinfo = tmp_path / "cpuinfo"
    assert not probe_cpu(cpuinfo).multiplies_bfloat16  # not a Linux
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx512_vnni avx512_bf16\n")
    assert probe_cpu(cpuinfo).multiplies_bfloat16
    monkeypatch.setenv("QUIRE_CPU_ISA", "avx512vnni")
    assert not probe_cpu(cpuinfo).multiplies_bfloat16


@pytest.mark.parametrize(
    ("options", "warns"),
    [({"quantization": "int8"}, True), ({"kv_cache_dtype": "bfloat16"}, False), ({"dtype": "float32"}, False)],
    ids=str,
)
def test_the_chosen_kernels_are_reported_and_a_warning_says_if_the_plan_assumed_others(
    options: dict[str, Any],
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As after a failed self-test of the kernels that the plan assumed."""
    monkeypatch.setattr(devices, "probe_cpu", lambda: Device("cpu", multiplies_bfloat16=True))
    best = cpu.isa()
    try:
        cpu.use_isa("portable")
        LLM(num_blocks=64, threads=1, verbose=True, **options).close()
    finally:
        cpu.use_isa(best)
    assert "\nkernels (portable, 1 thread): " in capsys.readouterr().err
    assert ["but the portable kernels run" in message for message in caplog.messages] == [True] * warns


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cores_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda process: set(range(4, 12)))
    assert usable_cores(tmp_path) == 8  # the topology is unknown
    for number in range(16):  # 0 and 8 are one core, 1 and 9 ...
        write(
            tmp_path / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list",
            f"{number % 8},{number % 8 + 8}\n",
        )
    assert usable_cores(tmp_path) == 8  # 4 to 7 alone, and 8 to 11
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda process: set(range(16)))
    assert usable_cores(tmp_path) == 8

    # A limit applies to all groups below it; only whole cores count.
    groups = tmp_path / "sys/fs/cgroup"
    write(tmp_path / "proc/self/cgroup", "0::/kubepods/pod1/quire\n")
    write(groups / "kubepods/pod1/quire/cpu.max", "max 100000\n")
    assert usable_cores(tmp_path) == 8
    write(groups / "kubepods/pod1/cpu.max", "350000 100000\n")
    assert usable_cores(tmp_path) == 3
    write(groups / "kubepods/cpu.max", "600000 100000\n")
    assert usable_cores(tmp_path) == 3
    write(groups / "cpu.max", "20000 100000\n")  # as seen inside a container
    assert usable_cores(tmp_path) == 1
    (groups / "cpu.max").unlink()

    # cgroups v1, where a container's group may not be at the path that its name says.
    write(tmp_path / "proc/self/cgroup", "3:cpuset:/\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n")
    write(groups / "cpu/cpu.cfs_period_us", "50000\n")
    write(groups / "cpu/cpu.cfs_quota_us", "-1\n")
    assert usable_cores(tmp_path) == 8
    write(groups / "cpu/cpu.cfs_quota_us", "250000\n")
    assert usable_cores(tmp_path) == 5
    monkeypatch.undo()
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


def test_cores_are_counted_again() -> None:
    """A container's limit that changes while the engine runs counts from the next second on."""
    cores, now = 4, 100.0
    count = ThreadCount(lambda: cores, lambda: now)
    cores = 2
    now += 0.5
    assert count() == 4
    now += 0.5
    assert count() == 2
    cores = 8
    assert count() == 2


@pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
def test_a_running_engine_follows_the_cores_that_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_RECOUNT", 0.0)
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    found = []
    try:
        with LLM(num_blocks=64, max_num_seqs=1) as llm:
            for allowed in (before, {min(before)}, before):
                os.sched_setaffinity(0, allowed)
                (output,) = llm.generate("ROMEO:", GREEDY)
                found.append((torch.get_num_threads(), output.outputs[0].token_ids))
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)
    tokens = found[0][1]
    assert found == [(usable_cores(), tokens), (1, tokens), (usable_cores(), tokens)]
