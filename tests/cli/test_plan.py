"""`quire plan` from outside: figures by hand, the tables, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire.cli import probe
from quire.cli.commands import run
from quire.engine.checkpoint import bundled_folder
from quire.model_config import ModelConfig
from quire.quantization import METHODS
from quire.simulation.calibration import TimedStep
from quire.simulation.devices import DEVICES, Device, find_device
from tests.simulation.traces import SLOW

FORMATS = ("float32", "float16", "bfloat16", *METHODS)


@pytest.fixture
def device(tmp_path: Path) -> str:
    path = tmp_path / "slow.json"
    curve = [[1, 1e-9], [64, 4e-9]]
    values = {**json.loads(SLOW.to_json()), "products": dict.fromkeys(FORMATS, curve), "process_memory": 2**28}
    path.write_text(json.dumps(values))
    return str(path)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["plan", "--json", *arguments]) == 0
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    return figures


def test_a_plan_of_this_machine_tells_no_times(capsys: pytest.CaptureFixture[str]) -> None:
    figures = planned(capsys, "--num-blocks", "64", "--context", "128")
    config = ModelConfig.from_folder(bundled_folder())
    assert figures["kv_bytes_per_1k_tokens"] == 1000 * config.spec.kv_bytes_per_token("float16")
    assert figures["users_that_fit"] == 8
    assert figures["expected"] == []
    assert figures["weights"] == config.spec.weight_bytes("float16")
    lines = {line["name"]: line for line in figures["alternatives"]}
    devices = ["RTX-4090", "L40S", "A100-80GB", "H100", "H200"]
    assert list(lines) == ["as planned", *METHODS, "int8 KV", "fp8 KV", *devices]
    assert "tokens_per_s" not in lines["int8"]
    assert lines["H200"]["tokens_per_s"] > lines["RTX-4090"]["tokens_per_s"]
    assert lines["int8"]["weights"] == config.spec.weight_bytes("float16", "int8")
    assert lines["int8 KV"]["kv_bytes_per_1k_tokens"] == 1000 * config.spec.kv_bytes_per_token("int8")
    assert "fp8_e4m3" in lines["fp8 KV"]["refused"]  # what the engine says of it on this machine


def test_expectations_on_a_device(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--device", device, "--num-blocks", "64", "--context", "128", "--prompt", "96", "--output", "32")
    figures = planned(capsys, *options)
    assert [row["users"] for row in figures["expected"]] == [1, 4, 8]
    assert figures["expected"][2]["tokens_per_s"] > figures["expected"][0]["tokens_per_s"]
    resident = figures["peak_resident"]
    assert resident["process"] == 2**28
    assert resident["total"] > resident["process"] + max(resident["loading"], resident["serving"])
    only = planned(capsys, *options, "--users", "3", "--no-compare")
    assert [row["users"] for row in only["expected"]] == [3]
    assert "alternatives" not in only
    assert run(["plan", *options]) == 0
    shown = capsys.readouterr().out
    for part in ("expected on slow: prompts of 96 tokens, answers of 32", "what would change", "int4", "H200"):
        assert part in shown


def test_a_gpu_instead_stores_no_layers_in_few_bits(capsys: pytest.CaptureFixture[str]) -> None:
    figures = planned(capsys, "--num-blocks", "64", "--context", "128", "--users", "2", "--quantization", "int8")
    lines = {line["name"]: line for line in figures["alternatives"]}
    assert lines["H200 in float16"]["weights"] == ModelConfig.from_folder(bundled_folder()).spec.weight_bytes("float16")
    assert lines["H200 in float16"]["tokens_per_s"] > 0


def test_a_gpu_gives_kv_what_the_weights_leave(capsys: pytest.CaptureFixture[str]) -> None:
    figures = planned(capsys, "--device", "A100-40GB", "--users", "2", "--no-compare")
    assert figures["available"] == int(0.9 * 40 * 2**30)
    assert figures["total"] <= figures["available"]
    # The bundled model is so small that all sequences at their longest fit.
    assert figures["users_that_fit"] == 256
    assert figures["peak_resident"] is None
    small = planned(capsys, "--device", "L40S", "--users", "2", "--kv-cache-memory", "1GiB", "--context", "64")
    lines = {line["name"]: line for line in small["alternatives"]}
    assert lines["fp8 KV"]["kv_tokens"] == 2 * lines["as planned"]["kv_tokens"]
    assert lines["as planned"]["kv_tokens"] == small["num_blocks"] * small["block_size"]
    assert lines["H200"]["tokens_per_s"] > lines["as planned"]["tokens_per_s"] > 0


def test_a_trace_in_the_place_of_users(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "made.csv"
    trace.write_text("prompt_tokens,output_tokens,arrival_s\n10,5,0\n20,5,1\n")
    figures = planned(capsys, "--device", device, "--trace", str(trace), "--no-compare")
    assert figures["expected"][0]["trace"] == "made.csv"
    assert figures["expected"][0]["requests_per_s"] > 0


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("MixtralForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2}),
        ("Gemma2ForCausalLM", {"head_dim": 64, "sliding_window": 128}),
        ("StableLmForCausalLM", {"qk_layernorm": True, "use_qkv_bias": True}),
    ],
)
def test_families_that_differ_from_llama(
    architecture: str,
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    config = {"architectures": [architecture], "torch_dtype": "bfloat16", **shape, **heads, **values}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = ModelConfig.from_folder(tmp_path).spec
    figures = planned(capsys, str(tmp_path), "--device", "H100", "--users", "4", "--prompt", "64", "--output", "16")
    assert figures["weights"] == spec.weight_bytes("bfloat16")
    assert figures["kv_bytes_per_1k_tokens"] == 1000 * 2 * 2 * 2 * 64 * 2
    assert figures["expected"][0]["tokens_per_s"] > 0
    lines = {line["name"]: line for line in figures["alternatives"]}
    assert lines["as planned"]["tokens_per_s"] == figures["expected"][0]["tokens_per_s"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "abacus"], "device is 'abacus'; it must be a name that quire plan --list-devices shows"),
        (["--device", "B300"], "did you mean B200?"),
        (["--device", "a100"], "did you mean A100-40GB or A100-80GB?"),
        (["--num-devices", "0"], "num_devices is 0; it must be at least 1"),
        (["--users", "0"], "users is 0; it must be at least 1"),
        (["--users", "300"], "users is 300, but at most 256 run at once; raise max_num_seqs"),
        (["--context", "9999999"], "context is 9999999, but the longest context is"),
        (["--context", "64", "--prompt", "60", "--output", "10"], "together more than the context of 64 tokens"),
        (["--measure", "no/such/folder/cpu.json"], "There is no folder no/such/folder"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_measuring_times_real_steps_and_writes_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On models a hundredth of the size, whose times say nothing of the machine; so the fit is another test's."""
    tiny = {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    monkeypatch.setattr(probe, "_SHAPES", (tiny,))
    monkeypatch.setattr(probe, "_LONG_SHAPE", {**tiny, "num_hidden_layers": 3})
    monkeypatch.setattr(probe, "_BATCHES", ((1, 16), (4, 16), (1, 512)))
    monkeypatch.setattr(probe, "_LONG_BATCHES", ((4, 256), (1, 16)))
    monkeypatch.setattr(probe, "NUM_PASSES", 1)
    timed: list[TimedStep] = []

    def keep(steps: list[TimedStep], *, process_memory: float, **values: Any) -> Device:
        timed.extend(steps)
        return replace(SLOW, process_memory=process_memory, **values)

    monkeypatch.setattr(probe, "fit_device", keep)
    path = tmp_path / "cpu.json"
    assert run(["plan", "--measure", str(path), "--threads", "1"]) == 0
    assert "wrote" in capsys.readouterr().out
    measured = find_device(str(path))
    assert (measured.name, measured.bandwidth) == ("cpu", SLOW.bandwidth)
    assert measured.process_memory > 50 * 2**20
    assert {step.model.weight_format for step in timed} == set(FORMATS)
    assert all(step.seconds > 0 for step in timed)
    short = [step for step in timed if step.model.spec.num_layers == 2 and step.model.weight_format == "int8"]
    assert [(step.num_sequences, step.tokens_per_sequence) for step in short] == [
        (1, 16), (1, 1), (4, 16), (4, 1), (1, 512), (1, 1)
    ]  # fmt: skip
    # Steps 2 to 7 decode; the middle one is the fifth, which finds four tokens more than the prompt less the last.
    assert [step.context for step in short] == [0, 19, 0, 19, 0, 515]
    long = next(step for step in timed if step.model.spec.num_layers == 3 and step.tokens_per_sequence == 1)
    assert long.num_sequences == 4
    assert 256 + probe.NUM_DECODING // 2 <= long.context < 256 + 16


def test_a_family_that_cannot_be_served_is_planned_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "architectures": ["FutureForConditionalGeneration"],
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(["plan", str(tmp_path), "--no-compare"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "FutureForConditionalGeneration cannot be served yet; an estimate from config.json" in said
    assert "KV of 1,000 tokens takes" in said
    assert planned(capsys, str(tmp_path), "--no-compare")["served"] is False
    assert planned(capsys, "--no-compare")["served"] is True


LARGE = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}
"""Sizes of Llama-3.1-70B."""
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
WINDOWS = {"head_dim": 256, "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 40}


def large(folder: Path, architecture: str = "LlamaForCausalLM", **values: Any) -> str:
    """The folder of a large model's config.json, without weights."""
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **LARGE, **values}))
    return str(folder)


@pytest.mark.parametrize(
    ("architecture", "values", "arguments"),
    [
        ("LlamaForCausalLM", {}, ("--device", "H100", "--users", "1")),
        ("LlamaForCausalLM", {}, ("--device", "rtx 4060 ti 16gb", "--users", "1", "--no-compare")),
        ("LlamaForCausalLM", {"quantization_config": GPTQ}, ("--device", "epyc-9654", "--users", "1")),
        ("Gemma3ForCausalLM", WINDOWS, ("--device", "B200", "--users", "1", "--no-compare")),
        ("NobodyKnowsForCausalLM", {}, ("--device", "xeon-8480", "--users", "1", "--no-compare")),
        ("LlamaForCausalLM", {}, ("--device", "H100", "--users", "200", "--no-compare")),
        ("LlamaForCausalLM", {}, ("--list-devices",)),
    ],
)
def test_no_line_is_longer_than_80_columns(
    architecture: str, values: dict[str, Any], arguments: tuple[str, ...], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(["plan", large(tmp_path, architecture, **values), "--output", "8", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) > 15


def test_users_hold_the_given_prompt_and_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = large(tmp_path)
    options = ("--device", "H200", "--no-compare", "--users", "1", "--max-num-seqs", "4096")
    fitting = {}
    for prompt, output in ((96, 32), (992, 32), (1950, 98)):
        lengths = ("--prompt", str(prompt), "--output", str(output))
        fitting[prompt + output] = planned(capsys, folder, *options, *lengths)["users_that_fit"]
    assert fitting[128] == pytest.approx(8 * fitting[1024], rel=0.01)
    assert fitting[1024] == pytest.approx(2 * fitting[2048], rel=0.01)
    held = planned(capsys, folder, *options, "--prompt", "96", "--output", "32", "--context", "1024")
    assert held["users_that_fit"] == fitting[1024]
    # The number that fits is the last one whose times are given.
    few = ("--device", "H200", "--no-compare", "--num-blocks", "20", "--prompt", "96", "--output", "32")
    figures = planned(capsys, folder, *few)
    assert figures["expected"][-1]["users"] == figures["users_that_fit"] == 10
    assert figures["expected"][-1]["preemptions"] == 0


@pytest.mark.parametrize(
    ("device", "backend"), [("T4", "sdpa"), ("V100-32GB", "sdpa"), ("H100", "triton"), ("pi-5", "cpu")]
)
def test_the_backend_is_the_one_that_the_device_would_use(
    device: str, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = planned(capsys, "--device", device, "--no-compare", "--users", "1", "--output", "4")
    assert figures["attention_backend"] == backend
    assert not figures["planned_only"]


def test_several_devices_are_marked_as_a_plan_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = large(tmp_path)
    options = (folder, "--device", "H100", "--users", "1", "--output", "4", "--no-compare")
    figures = planned(capsys, *options)
    assert (figures["num_devices"], figures["planned_only"]) == (2, True)
    assert run(["plan", *options]) == 0
    said = capsys.readouterr().out
    assert "2 × H100 *" in said
    assert "* a plan only" in said


def test_every_known_device_has_a_source_and_gives_a_plan() -> None:
    assert len(DEVICES) >= 20
    assert sum(device.is_host for device in DEVICES.values()) >= 6
    for device in DEVICES.values():
        assert device.source
        assert find_device(device.name.lower().replace("-", " ")) is device


def test_few_bits_of_a_checkpoint_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those of a config.json without weights: it says how they would be stored."""
    on_cpu = ("--device", "epyc-9654", "--users", "1", "--prompt", "1", "--output", "8", "--no-compare")
    dense = planned(capsys, large(tmp_path), *on_cpu)
    packed = planned(capsys, large(tmp_path, quantization_config=GPTQ), *on_cpu)
    assert 0.25 < packed["weights"] / dense["weights"] < 0.32
    assert packed["expected"][0]["tokens_per_s"] > 2 * dense["expected"][0]["tokens_per_s"]
    # A card's kernels multiply floats.
    on_card = planned(capsys, large(tmp_path, quantization_config=GPTQ), "--device", "B200", *on_cpu[2:])
    assert on_card["weights"] == dense["weights"]
    path = str(tmp_path / "config.json")
    assert planned(capsys, path, *on_cpu)["weights"] == packed["weights"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "RTX-4090", "--num-devices", "1"], ["8 × RTX-4090 (", "2 × H200 (256 users of 640 tokens)"]),
        (["--device", "ryzen-7950x"], ["int4 (", "users of 640 tokens"]),
        (
            ["--device", "epyc-9654", "--max-model-len", "131072", "--num-blocks", "9"],
            ["would fit, or kv_cache_memory", "the KV cache and context that memory allows ("],
        ),
    ],
)
def test_what_does_not_fit_says_what_would(
    arguments: list[str], said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", large(tmp_path), *arguments]) == 3
    shown = capsys.readouterr().err
    for part in [*said, "What would fit: "]:
        assert part in shown


def test_more_users_than_fit_are_named_with_what_would_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--device", "H100", "--users", "60", "--prompt", "96", "--output", "4", "--num-blocks", "100")
    assert run(["plan", large(tmp_path), *options]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Of 60 users 50 fit, so the others wait." in said
