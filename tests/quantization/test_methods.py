"""Quantised models: the memory their plan promises, the perplexity they keep, the same tokens in every batch."""

from pathlib import Path

import pytest
import torch

from benchmarks.quantization import perplexity
from quire import LLM, SamplingParams
from quire.config import EngineConfig
from quire.engine.checkpoint import bundled_folder
from quire.engine.memory_plan import plan_memory
from quire.errors import ConfigError, MemoryPlanError
from quire.kernels import kernels_for, reference
from quire.kernels.interface import QuantizedWeight
from quire.layers.linear import Linear, LinearWeight, output_head
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.more_bits import MoreBits
from quire.models.registry import load_model
from quire.quantization import METHODS, WeightFormat
from tests.checkpoints import LAYER_KINDS, make_checkpoint
from tests.paged_model import PagedModel

GIB = 2**30


def quantized_bytes(model: object) -> int:
    """Of all quantised weights that can be reached from a model's attributes."""
    if isinstance(model, Linear):
        assert isinstance(model.packed, QuantizedWeight)
        return model.packed.nbytes
    if isinstance(model, list):
        return sum(map(quantized_bytes, model))
    names = (
        getattr(model, "__slots__", None) or vars(model) if type(model).__module__.startswith("quire.models") else ()
    )
    return sum(quantized_bytes(getattr(model, name)) for name in names)


def test_bytes_of_a_weight() -> None:
    assert WeightFormat(8, 64).weight_bytes(10, 64) == 10 * (64 + 2)
    assert WeightFormat(4, 32).weight_bytes(10, 64) == 10 * (32 + 2 * 2 + 4)
    assert WeightFormat(4, 64).weight_bytes(10, 65) == 10 * (32 + 2 * 2 + 4)


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_counts_what_the_model_takes(method: str) -> None:
    folder = bundled_folder()
    config = ModelConfig.from_folder(folder)
    more = MoreBits.choose(config, open_checkpoint(folder), method)
    model = load_model(
        config, open_checkpoint(folder), kernels_for("cpu"), method, packing=more.around(kernels_for("cpu"))
    )
    vectors = config.spec.num_vector_parameters * 4
    plan = plan_memory(EngineConfig(num_blocks=64, quantization=method), config, available=GIB)
    unspent = METHODS[method].extra_bytes(config.spec.layer_parameters) - sum(each.num_bytes for each in more.chosen)
    assert plan.weights == quantized_bytes(model) + vectors + unspent
    assert plan.weights < config.spec.weight_bytes("float16") * (0.6 if method == "int8" else 0.4)
    assert plan.to_dict()["quantization"] == method
    assert f"({method})" in plan.describe()[0]
    assert plan.kv_cache_dtype in ("float16", "bfloat16")


def test_the_plan_of_a_plain_mlp_with_learned_positions(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt2", vocab_size=288)
    config = ModelConfig.from_folder(folder)
    model = load_model(config, open_checkpoint(folder), kernels_for("cpu"), "int8")
    positions = 256 * 64 * 4
    assert (
        config.spec.weight_bytes("float32", "int8")
        == quantized_bytes(model) + positions + config.spec.num_vector_parameters * 4
    )


def test_what_does_not_fit_is_told_what_would() -> None:
    model = ModelConfig.from_folder(bundled_folder())
    with pytest.raises(
        MemoryPlanError, match=r"as float16 .*; as quantization int8 the weights take .* MiB, as quantiz"
    ):
        plan_memory(EngineConfig(), model, available=6_500_000)
    with pytest.raises(
        MemoryPlanError,
        match=r"take .* as int8 beside .*; as quantization int4 .*, as quantization int4-fast the weights take [^,]*$",
    ):
        plan_memory(EngineConfig(quantization="int8"), model, available=3_700_000)


def test_an_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match="quantization is 'awq'; it must be one of int8, int4, int4-fast, or left out"
    ):
        EngineConfig(quantization="awq")


@pytest.mark.parametrize("kernels", [reference, kernels_for("cpu")], ids=["reference", "cpu"])
@pytest.mark.parametrize(("method", "error"), [("int8", 0.02), ("int4", 0.15)])
def test_a_layer_side_by_side(kernels: object, method: str, error: float) -> None:
    weights = [torch.randn(n, 200) for n in (40, 3, 30)]
    bias, x = torch.randn(73).bfloat16(), torch.randn(50, 200)
    expected = torch.cat([x @ weight.T for weight in weights], dim=1) + bias.float()
    parts = [LinearWeight(weight, part) for weight, part in zip(weights, bias.split((40, 3, 30)), strict=True)]
    layer = Linear(kernels, parts, method)  # type: ignore[arg-type]  # a module satisfies the protocol
    assert isinstance(layer.packed, QuantizedWeight)
    for weight in weights:
        weight.fill_(float("nan"))  # nothing of the argument is kept
    y = layer(x)
    assert (y - expected).norm() < error * expected.norm()


def test_the_head_has_its_own_format() -> None:
    table = torch.randn(64, 128)
    for method, row in METHODS.items():
        head = output_head(kernels_for("cpu"), LinearWeight(table), method)
        assert isinstance(head.packed, QuantizedWeight)
        assert head.packed.stored == row.head
    assert output_head(kernels_for("cpu"), LinearWeight(table), "float16").packed.dtype == torch.float16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "family",
    LAYER_KINDS,
)
def test_every_family_computes_what_the_reference_does(family: str, method: str, tmp_path: Path) -> None:
    """The same quantised model through plain PyTorch; a tied embedding reads the quantised head."""
    folder = make_checkpoint(tmp_path, family)
    tokens = {0: [1, 2, 3, 4, 5, 6, 7], 1: [9], 2: [200, 100, 50]}
    fast = PagedModel(folder, method).step(tokens)
    slow = PagedModel(folder, method, kernels=reference).step(tokens)
    for sequence in tokens:
        # A value that falls on another side of a half is one step of 127 away. With 4 bits sums in another order may
        # choose another of two scales that are as good as each other.
        difference = (fast[sequence] - slow[sequence]).norm() / slow[sequence].norm()
        assert difference < (2e-2 if method == "int8" else 4e-2)


@pytest.mark.parametrize(("method", "allowed"), [("int8", 0.003), ("int4", 0.015), ("int4-fast", 0.05)])
def test_perplexity_stays_near_that_of_float32(method: str, allowed: float) -> None:
    plain = perplexity(threads=1, num_tokens=2000, dtype="float32")
    assert 10 < plain < 25
    quantized = perplexity(threads=1, num_tokens=2000, dtype="float32", quantization=method)
    assert quantized == pytest.approx(plain, rel=allowed)


@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_the_same_in_every_batch(method: str) -> None:
    llm = LLM(num_blocks=500, max_num_seqs=16, threads=1, quantization=method)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=1)
    prompts = ["ROMEO:", "What news from", "O", "KING RICHARD II:\nNow is the winter of our discontent\n" * 4] * 3
    together = llm.generate(prompts, params)
    for prompt, output in zip(prompts[:4], together, strict=False):
        llm.reset_prefix_cache()
        (alone,) = llm.generate(prompt, params)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
