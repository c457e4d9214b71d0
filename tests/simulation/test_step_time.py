"""Time of a step and sizes of models and devices, against figures computed by hand or printed in the paper."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quire.errors import ConfigError
from quire.model_config import ModelConfig
from quire.simulation.devices import DEVICES, Device, fewest_devices, find_device, kv_bytes_left
from quire.simulation.model_shapes import MODEL_SHAPES, ModelShape, find_model_shape
from quire.simulation.step_time import StepTime
from tests.simulation.traces import TINY_CONFIG

IDEAL_A100 = Device(name="ideal", memory=40 * 2**30, bandwidth=1.555e12, matrix_rate=3.12e14)


def test_the_paper_s_sizes() -> None:
    for name, gigabytes, per_token, slots, device, count in (
        ("OPT-13B", 26, 819_200, 15_728, "A100-40GB", 1),
        ("OPT-66B", 132, 2_359_296, 9_557, "A100-40GB", 4),
        ("OPT-175B", 346, 4_718_592, 60_074, "A100-80GB", 8),
    ):
        shape, machine = MODEL_SHAPES[name], DEVICES[device]
        assert shape.weight_bytes / 1e9 == pytest.approx(gigabytes, rel=0.02)
        assert shape.kv_bytes_per_token == per_token
        assert fewest_devices(shape, machine) == count
        assert kv_bytes_left(shape, machine, count) // per_token == slots


def test_a_decoding_step_is_bound_by_what_it_reads() -> None:
    step = StepTime(MODEL_SHAPES["OPT-13B"], IDEAL_A100)
    one = step.seconds(1, 1, 0, 0, 1)
    assert one == pytest.approx(0.0167, rel=0.02)
    assert step.seconds(1, 1, 1000, 1000, 1) - one == pytest.approx(0.527e-3, rel=0.01)


def test_a_prompt_is_bound_by_what_it_computes() -> None:
    shape = MODEL_SHAPES["OPT-13B"]
    num_tokens = 2000
    pairs = num_tokens * (num_tokens + 1) / 2
    layers = 2 * 40 * 12 * 5120**2 * num_tokens
    attention = 4 * 40 * 5120 * pairs
    expected = (layers + 2 * 50272 * 5120 + attention) / 3.12e14
    assert StepTime(shape, IDEAL_A100).seconds(1, num_tokens, num_tokens, pairs, 1) == pytest.approx(expected, rel=1e-9)


def test_devices_share_the_work_and_pay_for_it() -> None:
    shape, device = MODEL_SHAPES["OPT-66B"], DEVICES["A100-40GB"]
    four, eight = StepTime(shape, device, 4), StepTime(shape, device, 8)
    reduce = 2 * shape.spec.num_layers * device.reduce_latency
    moved = 2 * shape.spec.num_layers * shape.spec.hidden_size * 2 / device.link_bandwidth
    apart = four.seconds(0, 0, 0, 0, 0) - device.step_overhead - reduce
    assert eight.seconds(0, 0, 0, 0, 0) - device.step_overhead - reduce == pytest.approx(apart / 2)
    assert four.seconds(0, 1, 0, 0, 0) - four.seconds(0, 0, 0, 0, 0) == pytest.approx(1.5 * moved, rel=1e-3)


MIXTURE = replace(TINY_CONFIG, num_experts=8, num_experts_per_token=2, expert_intermediate_size=128)
DENSE_BYTES = 2 * (2 * (128 * 64 + 64 * 64 + 8 * 64) + 256 * 64)  # qkv, o and router of two layers, the head; float16
EXPERT_BYTES = 2 * 2 * 3 * 64 * 128  # one expert of both layers


@pytest.mark.parametrize(("num_tokens", "num_read"), [(1, 2), (3, 6), (4, 8), (100, 8)])
def test_a_step_reads_the_experts_its_tokens_are_sent_to(num_tokens: int, num_read: int) -> None:
    device = Device(name="reads", memory=2**30, bandwidth=1e9, matrix_rate=1e30)
    seconds = StepTime(ModelShape.of(MIXTURE, "m", dtype="float16"), device).seconds(1, num_tokens, 0, 0, 1)
    assert seconds == pytest.approx((DENSE_BYTES + num_read * EXPERT_BYTES) / 1e9)


def test_a_token_is_computed_by_its_own_experts() -> None:
    device = Device(name="computes", memory=2**30, bandwidth=1e30, matrix_rate=1e9)
    step = StepTime(ModelShape.of(MIXTURE, "m", dtype="float16"), device)
    per_token = 2 * MIXTURE.spec.active_layer_parameters
    assert step.seconds(1, 101, 0, 0, 1) - step.seconds(1, 1, 0, 0, 1) == pytest.approx(100 * per_token / 1e9)


def test_measured_experts_see_their_share_of_the_tokens() -> None:
    curve = [[1, 1e-9], [16, 4e-9], [64, 20e-9]]
    device = Device(name="measured", memory=2**30, bandwidth=1e30, matrix_rate=1e30, products={"float16": curve})
    step = StepTime(ModelShape.of(MIXTURE, "m", dtype="float16"), device)
    dense, expert = (DENSE_BYTES - 2 * 256 * 64) / 2, EXPERT_BYTES / 2
    head = 256 * 64 * 1e-9
    assert step.seconds(1, 1, 0, 0, 1) == pytest.approx(head + (dense + 2 * expert) * 1e-9)
    # 64 tokens: 16 for each of the 8 experts.
    assert step.seconds(1, 64, 0, 0, 1) == pytest.approx(head + dense * 20e-9 + 8 * expert * 4e-9)
    assert step.seconds(0, 0, 0, 0, 0) == 0


def test_overheads_and_slowdown() -> None:
    shape = MODEL_SHAPES["OPT-13B"]
    plain = StepTime(shape, IDEAL_A100)
    costly = StepTime(shape, Device(**{**_fields(IDEAL_A100), "step_overhead": 0.5, "sequence_overhead": 0.25}))
    assert costly.seconds(4, 4, 9, 9, 4) - plain.seconds(4, 4, 9, 9, 4) == pytest.approx(1.5)
    slower = StepTime(shape, IDEAL_A100, attention_slowdown=1.25)
    bare = plain.seconds(1, 1, 0, 0, 1)
    assert slower.seconds(1, 1, 800, 800, 1) - bare == pytest.approx(1.25 * (plain.seconds(1, 1, 800, 800, 1) - bare))


@pytest.mark.parametrize(
    "values",
    [
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 260,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "torch_dtype": "bfloat16",
        },
        {"architectures": ["GPT2LMHeadModel"], "vocab_size": 260, "n_embd": 64, "n_layer": 3, "n_head": 4},
    ],
)
def test_a_config_json_gives_the_sizes_the_engine_plans_with(values: dict[str, object], tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "config.json").write_text(json.dumps(values))
    config = ModelConfig.from_folder(folder)
    for path in (folder, folder / "config.json"):
        shape = find_model_shape(str(path))
        int8 = ModelShape.of(config, "int8", quantization="int8")
        assert (
            int8.weight_bytes == config.spec.weight_bytes(shape.dtype, "int8") - 4 * config.spec.num_vector_parameters
        )
        assert shape.kv_bytes_per_token == config.spec.kv_bytes_per_token(config.checkpoint_dtype)
        assert shape.context_length == config.context_length
        assert shape.weight_bytes == config.spec.num_matrix_parameters * shape.dtype_bytes


def test_known_shapes_have_the_sizes_their_names_say() -> None:
    for name, billions in (("LLaMA-13B", 13.0), ("Llama-3.1-8B", 8.03), ("Qwen3-0.6B", 0.596)):
        assert find_model_shape(name.lower()).weight_bytes / 2e9 == pytest.approx(billions, rel=0.01)


def test_measured_coefficients_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"memory": 1e9, "bandwidth": 2e9, "matrix_rate": 3e9}))
    assert find_device(str(path)) == Device(name="mine", memory=1e9, bandwidth=2e9, matrix_rate=3e9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "device file"),
        ("[]", "device file"),
        ('{"memory": 1, "bandwidth": 1}', "matrix_rate"),
        ('{"memory": 1, "bandwidth": 0, "matrix_rate": 1}', "bandwidth is 0"),
        ('{"memory": 1, "bandwidth": "fast", "matrix_rate": 1}', "bandwidth is 'fast'"),
        ('{"memory": 1, "bandwidth": 1, "matrix_rate": 1, "speed": 1}', "speed"),
    ],
)
def test_bad_coefficients_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        find_device(str(path))


def test_unknown_names_and_weights_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="did you mean B200"):
        find_device("B300")
    with pytest.raises(ConfigError, match="one of OPT-13B"):
        find_model_shape("gpt-5")
    with pytest.raises(ConfigError, match="set num_devices"):
        kv_bytes_left(MODEL_SHAPES["OPT-66B"], DEVICES["A100-40GB"], 2)


def _fields(device: Device) -> dict[str, object]:
    return {name: getattr(device, name) for name in Device.__slots__}
