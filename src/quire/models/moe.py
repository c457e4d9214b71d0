"""Llama with experts in the place of the MLP, in all layers or in some: Qwen2-MoE, Qwen3-MoE, OLMoE."""

from typing import NamedTuple

from torch import Tensor

from quire.layers.experts import ExpertLinear, ExpertMLPs
from quire.models.blocks import GatedMLP, gated_mlp, rms_head_norms, rotary_attention
from quire.models.builder import Builder
from quire.models.decoder import MLP, DecoderLayer
from quire.models.experts import Experts
from quire.models.llama import Llama
from quire.models.routers import make_router
from quire.models.shards import Part
from quire.models.weights import WeightScope


class ExpertNames(NamedTuple):
    """One way of storing the experts of a layer. Names are relative to `block`."""

    block: str = "mlp"
    router: str = "gate"
    one_by_one: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Gate, up and down of each expert, below experts.N; read where `fused` is empty."""
    fused: tuple[str, ...] = ()
    """Tensors [experts, outputs, inputs] of all experts: gate above up, and down."""

    @property
    def first_tensor(self) -> str:
        """A tensor that tells this way from the others."""
        return f"{self.block}.{self.fused[0] if self.fused else f'experts.0.{self.one_by_one[0]}.weight'}"


FUSED = ("experts.gate_up_proj", "experts.down_proj")
"""The names that transformers 5 holds in memory."""


class MoELlama(Llama):
    """Llama's names around the experts."""

    layouts: tuple[ExpertNames, ...] = (ExpertNames(), ExpertNames(fused=FUSED))
    """Ways of storing the experts, the published one first."""
    shared = "shared_expert"
    router_vectors = ""
    """Where the router's vectors are; empty: with its matrix."""

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        attention = build.scope("self_attn")
        return DecoderLayer(
            build.norm("input_layernorm"),
            rotary_attention(attention, index, cos_sin, head_norms=rms_head_norms(attention)),
            build.norm("post_attention_layernorm"),
            self.make_mlp(build, index),
            residual_factor=build.config.residual_multiplier,
        )

    def make_mlp(self, build: Builder, index: int) -> MLP:
        """Experts, or the MLP of a dense layer."""
        config = build.config
        if not config.has_experts(index):
            return gated_mlp(build.scope("mlp"), config.intermediate_size)
        names = next((names for names in self.layouts if build.weights.has(names.first_tensor)), self.layouts[0])
        block = build.scope(names.block)
        logits = [block.weights.take_linear(names.router, (config.num_experts, config.hidden_size))]
        if config.shared_expert_gate:
            logits.append(block.weights.take_linear(f"{self.shared}_gate", (1, config.hidden_size)))
        return Experts(
            block.pack(*logits, quantizes=False),
            make_router(config, self.router_scope(block, names)),
            _fused_experts(block, names) if names.fused else _experts(block, names),
            shared=self.make_shared(build, block) if config.shared_expert_intermediate_size else None,
        )

    def router_scope(self, block: Builder, names: ExpertNames) -> WeightScope:
        """Where the router's vectors are."""
        return block.weights.scope(self.router_vectors or names.router)

    def make_shared(self, build: Builder, block: Builder) -> GatedMLP:
        """The network that every token passes beside its experts. `block` is the scope of the experts in `build`."""
        return gated_mlp(block.scope(self.shared), build.config.shared_expert_intermediate_size)


def _experts(build: Builder, names: ExpertNames) -> ExpertMLPs:
    return build.pack_experts(*take_experts(build, names, bias=build.config.mlp_bias))


def take_experts(build: Builder, names: ExpertNames, *, bias: bool) -> tuple[ExpertLinear, ExpertLinear]:
    """Gate above up, and down, of experts that are stored one by one."""
    config, (gate, up, down) = build.config, names.one_by_one
    hidden, inner = config.hidden_size, config.expert_intermediate_size
    scopes = [build.weights.scope(f"experts.{index}") for index in range(config.num_experts)]
    return (
        ExpertLinear.of(
            [
                [scope.take_linear(name, (inner, hidden), bias=bias, split="outputs") for name in (gate, up)]
                for scope in scopes
            ]
        ),
        ExpertLinear.of([[scope.take_linear(down, (hidden, inner), bias=bias, split="inputs")] for scope in scopes]),
    )


def _fused_experts(build: Builder, names: ExpertNames) -> ExpertMLPs:
    config = build.config
    hidden, inner, num_experts = config.hidden_size, config.expert_intermediate_size, config.num_experts
    both: tuple[Part, ...] = (("outputs", inner), ("outputs", inner))
    gate_up = build.weights.take_experts(names.fused[0], (num_experts, 2 * inner, hidden), both)
    down = build.weights.take_experts(names.fused[1], (num_experts, hidden, inner), (("inputs", inner),))
    return build.pack_experts(ExpertLinear([[each] for each in gate_up]), ExpertLinear([[each] for each in down]))
