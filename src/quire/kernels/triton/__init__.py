"""The kernels for CUDA tensors, in Triton. What each computes is written in `quire.kernels.reference`.

Activations are bfloat16, float16 or float32, computed with in float32; caches may be of these types or float8_e4m3fn,
with keys and values both laid out [num_blocks, num_kv_heads, block_size, head_dim]; indices are int32. The first
dimension of q, k, v and x may have any stride, so that views of one fused projection need no copy; all else is
contiguous. Nothing here waits for the device, and no launch depends on what a tensor holds, so every operation can be
captured in a CUDA graph.

Importing this package imports Triton. With TRITON_INTERPRET=1 in the environment it works on CPU tensors, slowly.
"""

from quire.kernels.cpu import row_argmax, sample_tokens
from quire.kernels.triton.activation import gelu_and_mul, silu_and_mul
from quire.kernels.triton.attention import paged_attention
from quire.kernels.triton.blocks import copy_blocks
from quire.kernels.triton.linear import (
    gather_rows,
    gather_rows_quantized,
    linear,
    glu_linear,
    rms_norm_linear,
    linear_quantized,
    pack_linear,
    quantize_linear,
    quantize_rows,
)
from quire.kernels.triton.norm import add_rms_norm, rms_norm, rms_norm_heads_
from quire.kernels.triton.rotary_kv import kv_cache_shapes, rotary_, rotary_write_kv, write_kv

__all__ = [
    "add_rms_norm",
    "copy_blocks",
    "gather_rows",
    "gather_rows_quantized",
    "gelu_and_mul",
    "kv_cache_shapes",
    "linear",
    "glu_linear",
    "rms_norm_linear",
    "linear_quantized",
    "pack_linear",
    "paged_attention",
    "quantize_linear",
    "quantize_rows",
    "rms_norm",
    "rms_norm_heads_",
    "rotary_",
    "rotary_write_kv",
    "row_argmax",
    "sample_tokens",
    "silu_and_mul",
    "write_kv",
]
