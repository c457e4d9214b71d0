"""Apertus: Llama with norms of queries and keys, and an MLP without gate whose activation, xIELU, is learnt."""

import torch
from torch import Tensor
from torch.nn import functional

from quire.models.blocks import plain_mlp, rms_head_norms, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.llama import Llama
from quire.models.weights import WeightScope


class XIELU:
    """A parabola for positive inputs, and for others an exponential that meets it at 0. Both have the slope `beta` at
    0; each layer learns how far they bend."""

    __slots__ = ("beta", "eps", "negative", "positive")

    def __init__(self, weights: WeightScope) -> None:
        self.positive = functional.softplus(weights.take("alpha_p", (1,)).float())
        self.beta = weights.take("beta", ()).float()
        self.negative = self.beta + functional.softplus(weights.take("alpha_n", (1,)).float())
        self.eps = weights.take("eps", ()).float()

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, I] -> [T, I]."""
        bent = torch.where(x > 0, self.positive * x * x, (torch.expm1(torch.min(x, self.eps)) - x) * self.negative)
        return bent.add_(x * self.beta).to(x.dtype)


class Apertus(Llama):
    """Llama's names, but for the norms of a layer."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        attention, mlp = build.scope("self_attn"), build.scope("mlp")
        return DecoderLayer(
            build.norm("attention_layernorm"),
            rotary_attention(attention, index, cos_sin, head_norms=rms_head_norms(attention)),
            build.norm("feedforward_layernorm"),
            plain_mlp(mlp, ("up_proj", "down_proj"), activation=XIELU(mlp.weights.scope("act_fn"))),
        )
