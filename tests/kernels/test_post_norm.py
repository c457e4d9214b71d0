"""Joined layers of an encoder: the bits of the CPU's single operations, which others compute one after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels import KVLayer, cpu, reference
from quire.kernels.interface import DenseWeight, LayerNormWeight, PostNormWeights
from quire.kernels.post_norm import layer_after_layer
from quire.quantization import METHODS
from tests.kernels.ragged_batch import Shape, ragged_batch

SHAPE = Shape(num_heads=4, num_kv_heads=4, head_dim=24)
HIDDEN, INNER = 40, 72
Pack = Callable[[Tensor], Any]


def as_float32(weight: Tensor) -> Tensor:
    return cpu.pack_linear([weight], "float32")


def as_int8(weight: Tensor) -> Any:
    stored = METHODS["int8"].layers
    assert not isinstance(stored, str)
    return cpu.quantize_linear([weight], stored)


def make_layers(pack: Pack) -> list[PostNormWeights]:
    """Three layers, the same for every packing."""
    random = torch.Generator().manual_seed(3)
    dtype = torch.float64 if pack is torch.Tensor.double else torch.float32

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) * 0.2

    def dense(num_outputs: int, num_inputs: int, bias: bool = True) -> DenseWeight:
        weight, shift = rand(num_outputs, num_inputs), rand(num_outputs).to(dtype)
        return DenseWeight(pack(weight), shift if bias else None, num_outputs)

    def norm(bias: bool = True) -> LayerNormWeight:
        weight, shift = (1 + rand(HIDDEN)).to(dtype), rand(HIDDEN).to(dtype)
        return LayerNormWeight(weight, shift if bias else None, 1e-5)

    width = SHAPE.num_heads * SHAPE.head_dim
    return [
        PostNormWeights(
            dense(3 * width, HIDDEN, bias),
            dense(HIDDEN, width),
            norm(bias),
            dense(INNER, HIDDEN),
            "gelu",
            dense(HIDDEN, INNER, bias),
            norm(),
        )
        for bias in (True, False, True)
    ]


@pytest.mark.parametrize("pack", [as_float32, as_int8])
@pytest.mark.parametrize("lengths", [(1,), (7, 33, 16), (300, 2)])
def test_joined_layers_are_single_operations(pack: Pack, lengths: tuple[int, ...]) -> None:
    batch = ragged_batch([(length, length) for length in lengths], SHAPE)
    x = torch.randn(sum(lengths), HIDDEN)
    found, expected, layers = x.clone(), x.clone(), make_layers(pack)
    _, kv, plan, params = batch.inputs()
    cpu.post_norm_layers_(found, layers, SHAPE.num_heads, kv, plan, params)
    layer_after_layer(cpu.__name__)(expected, layers, SHAPE.num_heads, kv, plan, params)
    assert not torch.equal(found, x)
    assert torch.equal(found, expected)


def test_joined_layers_against_float64() -> None:
    batch = ragged_batch([(7, 7), (33, 33), (16, 16)], SHAPE)
    x = torch.randn(56, HIDDEN)
    found, expected = x.clone(), x.double()
    _, kv, plan, params = batch.inputs()
    cpu.post_norm_layers_(found, make_layers(as_float32), SHAPE.num_heads, kv, plan, params)
    wide = KVLayer(torch.zeros_like(kv.keys, dtype=torch.float64), torch.zeros_like(kv.values, dtype=torch.float64))
    layers = make_layers(torch.Tensor.double)
    reference.post_norm_layers_(expected, layers, SHAPE.num_heads, wide, plan, params)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


def test_a_misshapen_weight_is_named() -> None:
    batch = ragged_batch([(7, 7)], SHAPE)
    _, kv, plan, params = batch.inputs()
    layer = make_layers(as_float32)[0]
    with pytest.raises(ValueError, match="packed: expected shape"):
        cpu.post_norm_layers_(torch.randn(7, HIDDEN), [layer._replace(o=layer.qkv)], SHAPE.num_heads, kv, plan, params)
