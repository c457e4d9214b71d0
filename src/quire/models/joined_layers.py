"""JoinedLayers: all layers of an encoder of BERT's shape as one operation of the kernels.

BERT, RoBERTa, XLM-R and DistilBERT have this shape. A layer that is rotated, gated, biased by distance, adapted, split
among ranks, or stored in codes or blocks has not; then each layer runs by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quire.kernels import AttentionParams, Kernels
from quire.kernels.interface import DenseWeight, LayerNormWeight, PostNormWeights, QuantizedWeight
from quire.layers.activation import FUSED_ACTIVATIONS
from quire.layers.attention import Attention
from quire.layers.linear import Linear
from quire.layers.norm import LayerNorm, Norm
from quire.layers.step_context import StepContext
from quire.models.blocks import PlainMLP, SelfAttention
from quire.models.decoder import DecoderLayer
from quire.models.opt import PostNormLayer


@dataclass(frozen=True, slots=True)
class JoinedLayers:
    """Called instead of the layers, with what they have in common."""

    weights: Sequence[PostNormWeights]
    num_heads: int
    kv_layer: int
    """Their part of the KV cache."""
    params: AttentionParams

    def __call__(self, kernels: Kernels, x: Tensor, context: StepContext) -> Tensor:
        """x [T, H], normed embeddings, overwritten -> hidden [T, H] of all tokens."""
        kv = context.kv_layers[self.kv_layer]
        kernels.post_norm_layers_(x, self.weights, self.num_heads, kv, context.attention[kv.group], self.params)
        return x


def joined_layers(layers: Sequence[DecoderLayer], last_norm: Norm) -> JoinedLayers | None:
    """The layers as one, if all have the shape and share a part of the KV cache; `last_norm` follows the last one."""
    weights = []
    norms = [*(layer.attention_norm for layer in layers[1:]), last_norm]
    for layer, mlp_norm in zip(layers, norms, strict=True):
        joined = _weights_of(layer, mlp_norm)
        if joined is None:
            return None
        weights.append(joined)
    attends = [layer.attention.attend for layer in layers if isinstance(layer.attention, SelfAttention)]
    first = attends[0]
    if any((attend.layer, attend.params) != (first.layer, first.params) for attend in attends):
        return None
    assert isinstance(layers[0].attention, SelfAttention)
    return JoinedLayers(weights, layers[0].attention.heads[0], first.layer, first.params)


def _weights_of(layer: DecoderLayer, mlp_norm: Norm) -> PostNormWeights | None:
    attention, mlp = layer.attention, layer.mlp
    if (
        not isinstance(layer, PostNormLayer)
        or not isinstance(attention, SelfAttention)
        or not isinstance(mlp, PlainMLP)
    ):
        return None
    qkv, o, up, down = (_dense(linear) for linear in (attention.qkv, attention.o, mlp.up, mlp.down))
    attention_norm, last = _norm(layer.mlp_norm), _norm(mlp_norm)
    if not (qkv and o and up and down and attention_norm and last) or not _is_plain(attention):
        return None
    if not isinstance(mlp.activation, str) or mlp.activation not in FUSED_ACTIVATIONS:
        return None
    return PostNormWeights(qkv, o, attention_norm, up, mlp.activation, down, last)


def _is_plain(attention: SelfAttention) -> bool:
    attend = attention.attend
    return (
        type(attend) is Attention
        and (attend.cos_sin is None and attention.cos_sin is None)
        and (attend.query_scales is None and attention.head_norms is None)
        and (attend.params.alibi_slopes is None and attend.params.sinks is None)
        and not (attention.num_gates or attention.clip_qkv > 0)
    )


def _dense(linear: Linear) -> DenseWeight | None:
    if type(linear) is not Linear or not isinstance(linear.packed, Tensor | QuantizedWeight):
        return None
    return DenseWeight(linear.packed, linear.bias, linear.num_outputs)


def _norm(norm: Norm | None) -> LayerNormWeight | None:
    return LayerNormWeight(norm.weight, norm.bias, norm.eps) if isinstance(norm, LayerNorm) else None
