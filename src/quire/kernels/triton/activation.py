"""Gated activations: a function of a row's first half, times the second half."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def gated_kernel(x, out, x_stride, size, BLOCK: tl.constexpr, FUNCTION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = place < size
    gate = tl.load(x + row * x_stride + place, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + size + place, mask=exists, other=0.0).to(tl.float32)
    if FUNCTION == "silu":
        gate = gate * tl.sigmoid(gate)
    elif FUNCTION == "gelu":
        gate = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    else:
        # (1 + tanh(y)) / 2 is the logistic function of 2 y.
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + row * size + place, (gate * up).to(out.dtype.element_ty), mask=exists)


def silu_and_mul(x: Tensor) -> Tensor:
    return _gated(x, "silu")


def gelu_and_mul(x: Tensor, tanh: bool) -> Tensor:
    return _gated(x, "gelu_tanh" if tanh else "gelu")


def _gated(x: Tensor, function: str) -> Tensor:
    num_rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    if num_rows:
        gated_kernel[(num_rows, triton.cdiv(size, BLOCK))](
            x, out, x.stride(0), size, BLOCK=BLOCK, FUNCTION=function, num_warps=NUM_WARPS
        )
    return out
