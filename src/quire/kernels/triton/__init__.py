"""The kernels for CUDA tensors, in Triton. What each computes is written in `quire.kernels.reference`.

Activations are bfloat16, float16 or float32; sums are float32. Caches may be of these types or float8_e4m3fn; keys and
values are both [num_blocks, num_kv_heads, block_size, head_dim]. Indices are int32. The first dimension of q, k, v and
x may have any stride, so views of one fused projection need no copy; all else is contiguous. Nothing here waits for the
device, and no launch depends on the values in a tensor, so every operation can be captured in a CUDA graph.

Importing this package imports Triton. With TRITON_INTERPRET=1 in the environment it works on CPU tensors, slowly.
"""

from quire.kernels.grouped_experts import experts, pack_experts
from quire.kernels.host_sampling import row_argmax, sample_tokens
from quire.kernels.lora import LORA_TILE
from quire.kernels.lora import add_lora_in_tiles as add_lora
from quire.kernels.post_norm import layer_after_layer
from quire.kernels.recurrence import causal_conv, gated_delta_rule
from quire.kernels.sdpa import kv_cache_shapes, latent_layer, linear_coded, pack_coded
from quire.kernels.triton.activation import gelu_and_mul, silu_and_mul
from quire.kernels.triton.attention import paged_attention
from quire.kernels.triton.blocks import copy_blocks
from quire.kernels.triton.linear import (
    activation_linear,
    gather_rows,
    gather_rows_quantized,
    glu_linear,
    linear,
    linear_quantized,
    pack_blocks,
    pack_linear,
    quantize_linear,
    rms_norm_linear,
)
from quire.kernels.triton.norm import add_rms_norm, rms_norm, rms_norm_heads_
from quire.kernels.triton.rotary_kv import rotary_, rotary_write_kv, write_kv
from quire.kernels.unfused import layer_norm

__all__ = [
    "LORA_TILE",
    "activation_linear",
    "add_lora",
    "add_rms_norm",
    "causal_conv",
    "copy_blocks",
    "describe",
    "experts",
    "gated_delta_rule",
    "gather_rows",
    "gather_rows_quantized",
    "gelu_and_mul",
    "glu_linear",
    "kv_cache_shapes",
    "latent_layer",
    "layer_norm",
    "linear",
    "linear_coded",
    "linear_quantized",
    "pack_blocks",
    "pack_coded",
    "pack_experts",
    "pack_linear",
    "paged_attention",
    "post_norm_layers_",
    "quantize_linear",
    "rms_norm",
    "rms_norm_heads_",
    "rms_norm_linear",
    "rotary_",
    "rotary_write_kv",
    "row_argmax",
    "sample_tokens",
    "silu_and_mul",
    "write_kv",
]

post_norm_layers_ = layer_after_layer(__name__)


def describe() -> str:
    return "triton"
