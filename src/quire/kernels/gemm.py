"""Matrix products with weights packed once: `y = x @ weight.T + bias`, x [M, K] float32, weight [N, K].

The fast ones are private operators of torch: oneDNN for float32 weights, FBGEMM for 16-bit weights with float32
arithmetic. Private means they may vanish or change, so each is tried on a small case before its first use, and
what fails the test is replaced by plain torch.

Why these, on a 2-core AVX-512 machine without bf16 instructions, 75 M weights in the four shapes of a 12-layer model,
milliseconds for all of them by M:

    M                        1      4      16     64     256
    torch linear            14.9   28.7    38.0   72.4   198
    oneDNN packed           17.7   18.6    25.2   53.6   162
    FBGEMM fp16 packed      10.2   11.5    21.1   52.1   182

One packed copy serves every M. At M = 1 oneDNN loses a sixth to plain torch; keeping a second, plain copy of all
weights for that one case is not worth twice the memory.
"""

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

FLOAT16_MAX = 65504.0


class PackedLinear(Protocol):
    """A weight, ready to be multiplied."""

    def __call__(self, x: Tensor) -> Tensor: ...


class PlainLinear:
    """torch's own product; a 16-bit weight is widened at each call, slow and small."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # A weight that is a view of a mapped file is copied: products must not wait for the disk.
        self.weight = weight.clone(memory_format=torch.contiguous_format)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class OneDNNLinear:
    """float32 weights in oneDNN's blocked layout."""

    __slots__ = ("bias", "multiply", "packed")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        ops = torch.ops.mkldnn
        self.packed = ops._reorder_linear_weight(weight.float(), None)
        self.multiply = ops._linear_pointwise.default
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.multiply(x, self.packed, self.bias, "none", [], "")
        return y


class FBGEMMLinear:
    """Weights held in float16, multiplied in float32. bfloat16 weights fit exactly but for their smallest."""

    __slots__ = ("multiply", "packed")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        ops = torch.ops.quantized
        self.packed: Any = ops.linear_prepack_fp16(weight.float(), bias)
        self.multiply = ops.linear_dynamic_fp16.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.multiply(x, self.packed)
        return y


def pack_linear(weight: Tensor, bias: Tensor | None, dtype: str) -> PackedLinear:
    """Pack `weight` [N, K] to be stored as `dtype`; nothing of the argument is kept."""
    if dtype == "float32":
        return OneDNNLinear(weight, bias) if has_onednn() else PlainLinear(weight.float(), bias)
    # The negated comparison also catches NaN, which FBGEMM would turn into a number.
    if not weight.abs().max() < FLOAT16_MAX:
        return pack_linear(weight, bias, "float32")
    if has_fbgemm():
        return FBGEMMLinear(weight, bias)
    return PlainLinear(weight.to(getattr(torch, dtype)), bias)


@cache
def has_onednn() -> bool:
    """Whether torch has oneDNN's packed float32 product and it computes what it should."""
    return _computes(OneDNNLinear, 1e-5)


@cache
def has_fbgemm() -> bool:
    """Whether torch has FBGEMM's float16 product and it computes what it should."""
    return _computes(FBGEMMLinear, 1e-3)


def _computes(linear: type[OneDNNLinear] | type[FBGEMMLinear], tolerance: float) -> bool:
    """Try one product of many rows and one of a single row against plain torch."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 48, generator=generator)
    bias = torch.randn(64, generator=generator)
    x = torch.randn(5, 48, generator=generator)
    expected = torch.nn.functional.linear(x, weight, bias)
    try:
        multiply = linear(weight, bias)
        found = (multiply(x), multiply(x[:1]))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    # Values are about 7 in size.
    return bool(
        (found[0] - expected).abs().max() <= 50 * tolerance and (found[1] - expected[:1]).abs().max() <= 50 * tolerance
    )
