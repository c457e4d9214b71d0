"""Adapters against peft: log-probabilities and greedy tokens, whatever the batch and wherever KV came from."""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, AsyncLLM, LoRARequest, RequestError, SamplingParams
from quire.errors import CheckpointError, ConfigError
from quire.kernels import cpu
from quire.lora.adapter_folder import CONFIG_FILE, TENSORS_FILE
from quire.lora.registry import Adapter
from tests.checkpoints import make_checkpoint
from tests.engine.serving import collect, run, until
from tests.lora.peft_adapters import ATTENTION, expected_logprobs, is_greedy, make_adapter

VOCAB_SIZE, COUNT = 260, 5
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enable_lora": True,
    "max_logprobs": VOCAB_SIZE,
    "threads": 1,
    "num_blocks": 200,
    "max_num_seqs": 8,
    "max_model_len": 128,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True)
REPORTED = GREEDY.with_changes(prompt_logprobs=VOCAB_SIZE)

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8, "target_modules": "all-linear"},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3, "o_proj": 16},
    },
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "regex": {"target_modules": r".*\.(?:1|2)\.(?:self_attn|mlp)\.(?:k_proj|gate_proj)"},
    "excluded": {"exclude_modules": ["layers.1.self_attn.q_proj"]},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["v_proj", "embed_tokens", "lm_head"]},
    "saved": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("lora") / "base", "llama")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Callable[[str], Path]:
    """A kind → its folder."""

    @cache
    def make(kind: str) -> Path:
        return make_adapter(base.parent / kind, base, seed=sum(map(ord, kind)), **KINDS[kind])

    return make


@pytest.fixture(scope="module")
def llm(base: Path, adapter: Callable[[str], Path]) -> object:
    """More kinds of adapters than slots, so that every test loads and evicts."""
    with LLM(str(base), max_loras=3, lora_modules=f"saved={adapter('saved')}", **OPTIONS) as llm:
        yield llm


def prompt(length: int, seed: int = 1) -> list[int]:
    ids: list[int] = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def requested(path: Path | None) -> LoRARequest | None:
    return None if path is None else LoRARequest(path.name, 1, str(path))


def generate(llm: LLM, prompts: list[list[int]], adapters: list[Path | None], params: SamplingParams = GREEDY) -> list:
    given = [{"prompt_token_ids": ids} for ids in prompts]
    return llm.generate(given, params, lora_request=[requested(path) for path in adapters], use_tqdm=False)


def tokens(outputs: list) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_a_mixed_batch_equals_peft(llm: LLM, base: Path, adapter: Callable[[str], Path]) -> None:
    """Every kind beside rows without an adapter, prompts of several chunks beside short ones."""
    adapters = [None, *map(adapter, KINDS), None, adapter("plain")]
    prompts = [prompt(3 + 17 * number % 71, number) for number in range(len(adapters))]
    outputs = generate(llm, prompts, adapters, REPORTED)
    for ids, path, output in zip(prompts, adapters, outputs, strict=True):
        expected = expected_logprobs(base, path, ids)
        found = torch.tensor([[at[token].logprob for token in range(VOCAB_SIZE)] for at in output.prompt_logprobs[1:]])
        assert (found - expected[:-1]).abs().max() <= 2e-4, path
        assert is_greedy(base, path, ids, output.outputs[0].token_ids), path
        if path is not None:  # else the test would pass without adapters
            assert (expected - expected_logprobs(base, None, ids)).abs().max() > 0.1, path
    waiting = llm._engine._core._adapters
    assert waiting is not None
    assert 0 < waiting._slots.adapters.num_bytes <= llm.memory_plan.adapters


def test_rows_without_an_adapter_keep_their_bits(llm: LLM, adapter: Callable[[str], Path]) -> None:
    params = REPORTED.with_changes(logprobs=5)
    alone = generate(llm, [prompt(40)], [None], params)[0]
    llm.reset_prefix_cache()
    mixed = generate(llm, [prompt(9), prompt(40), prompt(5)], [adapter("plain"), None, adapter("dora")], params)[1]
    assert mixed.prompt_logprobs == alone.prompt_logprobs
    assert mixed.outputs[0].logprobs == alone.outputs[0].logprobs


def test_prefixes_are_shared_within_an_adapter_only(llm: LLM, base: Path, adapter: Callable[[str], Path]) -> None:
    llm.reset_prefix_cache()
    ids, adapters = prompt(64, 9), [None, adapter("plain"), adapter("dora")]
    first = [generate(llm, [ids], [path])[0] for path in adapters]
    again = [generate(llm, [ids], [path])[0] for path in adapters]
    assert [output.num_cached_tokens for output in first] == [0, 0, 0]
    assert all(output.num_cached_tokens >= 48 for output in again)
    for path, one, other in zip(adapters, first, again, strict=True):
        assert tokens([one]) == tokens([other])
        assert is_greedy(base, path, ids, *tokens([one]))


def test_an_adapter_swapped_under_its_name_is_another(llm: LLM, base: Path, adapter: Callable[[str], Path]) -> None:
    """The files change in place: neither weights nor KV of the old ones are used."""
    folder, ids = base.parent / "swapped", prompt(50, 4)
    for kind in ("plain", "rslora", "plain"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapter(kind), folder)
        output = generate(llm, [ids], [folder])[0]
        assert is_greedy(base, adapter(kind), ids, *tokens([output]))
    assert output.num_cached_tokens >= 32, "what comes back finds its KV"


def test_preempted_forked_and_searched(base: Path, adapter: Callable[[str], Path]) -> None:
    """A pool too small for all: rows move, adapters stay with their requests. Samples and beams keep the adapter."""
    options = OPTIONS | {"num_blocks": 14, "block_size": 8, "max_num_batched_tokens": 16, "max_model_len": 96}
    adapters = [adapter("plain"), None, adapter("dora"), adapter("saved"), adapter("embeddings")]
    prompts, params = [prompt(20, seed) for seed in range(5)], GREEDY.with_changes(max_tokens=24)
    with LLM(str(base), max_loras=4, lora_modules=f"saved={adapter('saved')}", **options) as llm:
        generate(llm, [prompt(3)] * 5, adapters)  # loads them, so that all run at once
        outputs = generate(llm, prompts, adapters, params)
        assert llm.stats().total_preemptions > 0
        for ids, path, found in zip(prompts, adapters, tokens(outputs), strict=True):
            assert is_greedy(base, path, ids, found)
        samples = generate(llm, [prompts[0]], [adapter("plain")], GREEDY.with_changes(n=3, temperature=0.01))[0]
        beams = generate(llm, [prompts[0]], [adapter("saved")], GREEDY.with_changes(beam_width=2, n=1, max_tokens=3))[0]
    assert is_greedy(base, adapter("plain"), prompts[0], *tokens([samples]))
    logprobs = expected_logprobs(base, adapter("saved"), prompts[0] + beams.outputs[0].token_ids)
    score = sum(float(logprobs[len(prompts[0]) - 1 + i, token]) for i, token in enumerate(beams.outputs[0].token_ids))
    assert beams.outputs[0].cumulative_logprob == pytest.approx(score, abs=1e-3)


def test_quantised_base(base: Path, adapter: Callable[[str], Path]) -> None:
    """The update is added in float32 to what the quantised layer computes: the same change of log-probabilities."""
    ids = prompt(40, 2)
    with LLM(str(base), quantization="int8", kv_cache_dtype="float32", **OPTIONS) as llm:
        outputs = generate(llm, [ids, ids], [adapter("plain"), None], REPORTED)
    found = [
        torch.tensor([[at[token].logprob for token in range(VOCAB_SIZE)] for at in output.prompt_logprobs[1:]])
        for output in outputs
    ]
    adapted, plain = (expected_logprobs(base, path, ids)[:-1] for path in (adapter("plain"), None))
    rounding = (found[1] - plain).abs().mean()
    assert (found[0] - adapted).abs().mean() < 2 * rounding < 0.5 * (adapted - plain).abs().mean()


def test_kernels_of_other_devices(base: Path, adapter: Callable[[str], Path]) -> None:
    """The batched products of sdpa, which serve a GPU; here on the CPU."""
    adapters, prompts = (
        [adapter("plain"), None, adapter("dora"), adapter("plain")],
        [prompt(40), *map(prompt, (3, 4, 5))],
    )
    with LLM(str(base), attention_backend="sdpa", **OPTIONS) as llm:
        outputs = generate(llm, prompts, adapters)
    for ids, path, found in zip(prompts, adapters, tokens(outputs), strict=True):
        assert is_greedy(base, path, ids, found)


def test_batches_without_adapters_make_no_further_call(
    llm: LLM, base: Path, adapter: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("linear", "rms_norm_linear", "glu_linear", "rms_norm", "add_rms_norm", "add_lora", "paged_attention"):
        call = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, _name=name, _call=call: calls.append(_name) or _call(*args))

    def made_by(run: Callable[[], object]) -> list[str]:
        calls.clear()
        run()
        return calls.copy()

    generate(llm, [prompt(9)], [adapter("plain")])  # the layers hold adapters from now on
    with LLM(str(base), **OPTIONS | {"enable_lora": False}) as without:
        plain = made_by(lambda: without.generate([{"prompt_token_ids": prompt(9)}], GREEDY, use_tqdm=False))
    llm.reset_prefix_cache()
    assert made_by(lambda: generate(llm, [prompt(9)], [None])) == plain
    llm.reset_prefix_cache()
    adapted = made_by(lambda: generate(llm, [prompt(9)], [adapter("plain")]))
    # One gather for each of the four layers of a block, however many adapters there are.
    assert adapted.count("add_lora") == 4 * 3 * COUNT
    llm.reset_prefix_cache()
    kinds = [adapter(kind) for kind in ("plain", "layers", "regex")]
    generate(llm, [prompt(3)] * 3, [*kinds])  # loads them, so that the three run in the same steps
    three = made_by(lambda: generate(llm, [prompt(9, seed) for seed in range(3)], [*kinds]))
    assert three.count("add_lora") == adapted.count("add_lora")


FAMILIES = {
    "gpt2": {"target_modules": ["c_attn", "attn.c_proj", "c_fc", "wte"], "fan_in_fan_out": True},
    "phi3": {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "cohere": {"target_modules": ATTENTION},
    "qwen2-moe": {"target_modules": [*ATTENTION, "shared_expert.up_proj", "shared_expert.down_proj"]},
    "gpt-neox": {"target_modules": ["query_key_value", "dense_4h_to_h"]},
    "qwen3-next": {"target_modules": ["q_proj", "o_proj", "out_proj"]},
    "gemma3": {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    """Fused projections, other orders of rows, gates beside queries, experts' dense parts, parallel residuals."""
    base = make_checkpoint(tmp_path / "base", family)
    path = make_adapter(tmp_path / "adapter", base, seed=3, **FAMILIES[family])
    ids = [prompt(45, 5), prompt(6, 6)]
    with LLM(str(base), **OPTIONS) as llm:
        outputs = generate(llm, [*ids, ids[0]], [path, path, None], GREEDY)
    for at, (output, used) in enumerate(zip(outputs, (path, path, None), strict=True)):
        assert is_greedy(base, used, ids[at % 2], output.outputs[0].token_ids), used


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["gate_proj"]}, None),
        ({"r": 32}, r"has rank 32, the limit is 16 \(max_lora_rank\)"),
        ({"modules_to_save": ["o_proj"], "target_modules": ["q_proj"]}, "brings a whole weight of .*o_proj"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    llm: LLM, base: Path, tmp_path: Path, options: dict[str, Any], expected: str | None
) -> None:
    path = make_adapter(tmp_path / "adapter", base, **options)
    if expected is None:
        generate(llm, [prompt(4)], [path])
        return
    with pytest.raises(RequestError, match=expected):
        generate(llm, [prompt(4), prompt(5)], [None, path])
    assert not llm._engine.has_work


def test_an_adapter_of_another_model_is_refused(llm: LLM, base: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "llama", hidden_size=32)
    path = make_adapter(tmp_path / "adapter", other)
    with pytest.raises(RequestError, match=r"the update of .*_proj is \[.*32.*\], in this model the weight is \["):
        generate(llm, [prompt(4)], [path])
    experts = make_adapter(tmp_path / "moe", make_checkpoint(tmp_path / "gpt2", "gpt2"), target_modules=["c_attn"])
    with pytest.raises(RequestError, match=r"changes transformer\.h\.0\.attn\.c_attn, .* there are down_proj"):
        generate(llm, [prompt(4)], [experts])


def test_damage_behind_the_header_ends_the_call_and_nothing_else(
    llm: LLM, adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(adapter("plain"), folder)
    content = bytearray((folder / TENSORS_FILE).read_bytes())
    content[-400:] = b"\xff" * 400  # NaN
    (folder / TENSORS_FILE).write_bytes(content)
    with pytest.raises(RequestError, match="holds numbers that are not finite"):
        generate(llm, [prompt(4), prompt(5)], [folder, None])
    assert tokens(generate(llm, [prompt(5)], [adapter("plain")]))
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(RequestError, match=r"has no adapter_config\.json"):
        generate(llm, [prompt(4)], [folder])


def test_without_the_option_adapters_are_refused(base: Path, adapter: Callable[[str], Path]) -> None:
    with (
        LLM(str(base), **OPTIONS | {"enable_lora": False}) as llm,
        pytest.raises(RequestError, match="adapters are off; make LLM with enable_lora=True"),
    ):
        generate(llm, [prompt(4)], [adapter("plain")])
    with pytest.raises(ConfigError, match="give name=path"):
        LLM(str(base), lora_modules="nothing")
    with pytest.raises(CheckpointError, match="is not a folder"):
        LLM(str(base), lora_modules="a=/nowhere")


def test_adapters_survive_the_death_of_the_engine(base: Path, adapter: Callable[[str], Path]) -> None:
    """Three adapters share one slot; one request is closed while its adapter waits, and the engine is killed."""
    params = GREEDY.with_changes(max_tokens=60)
    modules = tuple(f"{kind}={adapter(kind)}" for kind in ("plain", "dora", "layers"))
    options = OPTIONS | {"max_loras": 1, "lora_modules": modules, "model": str(base)}

    async def test(engine: AsyncLLM) -> None:
        def ask(kind: str) -> Any:
            return collect(engine, prompt(9), params, adapter=engine.adapters.find(kind) if kind else None)

        tasks = [asyncio.ensure_future(ask(kind)) for kind in ("plain", "", "dora", "layers")]
        await asyncio.sleep(0.05)
        tasks.pop().cancel()
        await until(lambda: engine.stats.total_generated_tokens > 20)
        os.kill(engine.engine_pid, signal.SIGKILL)
        for kind, output in zip(("plain", "", "dora"), await asyncio.gather(*tasks), strict=True):
            path = adapter(kind) if kind else None
            assert is_greedy(base, path, prompt(9), output.outputs[0].token_ids), kind
        await until(lambda: engine.stats.num_running == engine.stats.num_waiting == 0)
        with pytest.raises(RequestError, match="has changed since"):
            await collect(engine, prompt(9), params, adapter=Adapter("0" * 40, str(adapter("rslora"))))

    run(test, **options)
