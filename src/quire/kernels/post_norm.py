"""`post_norm_layers_`, for kernel modules that compute one operation after the other."""

import sys
from collections.abc import Sequence
from typing import Protocol, cast

from torch import Tensor

from quire.kernels.coded import CodedWeight
from quire.kernels.interface import AttentionParams, AttentionPlan, DenseWeight, Kernels, KVLayer, PostNormWeights


class PostNormLayers(Protocol):
    def __call__(
        self,
        x: Tensor,
        layers: Sequence[PostNormWeights],
        num_heads: int,
        kv: KVLayer,
        plan: AttentionPlan,
        params: AttentionParams,
    ) -> None: ...


def layer_after_layer(module: str) -> PostNormLayers:
    """The operation, made of those of the named kernel module. What it computes:

    x [T, H] -> the same after all layers, in place. A layer is x = norm(x + o(attention(qkv(x)))), then x = norm(x +
    down(activation(up(x)))). Keys and values of a layer live in `kv` until the next one overwrites them.
    """

    def post_norm_layers_(
        x: Tensor,
        layers: Sequence[PostNormWeights],
        num_heads: int,
        kv: KVLayer,
        plan: AttentionPlan,
        params: AttentionParams,
    ) -> None:
        kernels = cast(Kernels, sys.modules[module])
        num_kv_heads = kv.values.shape[1]
        for layer in layers:
            heads = _product(kernels, x, layer.qkv)
            heads = heads.view(len(x), num_heads + 2 * num_kv_heads, -1)
            q, k, v = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
            kernels.write_kv(k, v, kv, plan.slots)
            attended = kernels.paged_attention(q, kv, plan, params).flatten(1)
            normed = kernels.layer_norm(x, _product(kernels, attended, layer.o), *layer.attention_norm)
            inner, down = _product(kernels, normed, layer.up), layer.down
            update = kernels.activation_linear(inner, layer.activation, down.packed, down.bias, down.num_outputs)
            x.copy_(kernels.layer_norm(normed, update, *layer.mlp_norm))

    return post_norm_layers_


def _product(kernels: Kernels, x: Tensor, dense: DenseWeight) -> Tensor:
    if isinstance(dense.packed, Tensor):
        return kernels.linear(x, *dense)  # type: ignore[arg-type]
    assert not isinstance(dense.packed, CodedWeight)
    return kernels.linear_quantized(x, *dense)  # type: ignore[arg-type]
