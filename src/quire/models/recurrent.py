"""Recurrent layers in the place of attention: the gated delta net of Qwen3-Next and the state space model of Mamba-2.

Both read a causal convolution of their projected input, let every head update its state, a matrix, once for each token,
and norm and gate what the state answers. Everything between the projections is float32. T new tokens of all sequences,
R output tokens, H hidden size; G key heads, K key_dim, V value_dim.
"""

import torch
from torch import Tensor
from torch.nn import functional

from quire.kernels import Kernels
from quire.kernels.interface import StateLayer
from quire.kernels.recurrent_plan import RecurrentPlan
from quire.layers.activation import activation_function
from quire.layers.linear import Linear
from quire.layers.norm import Norm, Normed
from quire.layers.step_context import StepContext
from quire.model_config import ModelConfig
from quire.model_config.recurrent import RecurrentConfig
from quire.models.blocks import SelfAttention, rotary_attention
from quire.models.builder import Builder
from quire.models.weights import WeightScope


class _Recurrent:
    """What both kinds have: projections, the convolution, and their place in the state."""

    def __init__(
        self, build: Builder, layer: int, in_proj: Linear, per_head: Linear, out_proj: Linear, conv_name: str = "conv1d"
    ) -> None:
        """`per_head`: the numbers that each head gets for itself."""
        recurrent = _recurrent(build.config)
        self.recurrent = recurrent
        self.place = sorted(recurrent.layers).index(layer)
        self.kernels: Kernels = build.kernels
        self.eps = build.config.norm_eps
        self.activation = activation_function(build.config.activation)
        """What follows the convolution; gates always have silu."""
        self.in_proj = in_proj
        self.per_head = per_head
        self.out_proj = out_proj
        weights, num_channels = build.weights.scope(conv_name), recurrent.num_channels
        filters = weights.take("weight", (num_channels, 1, recurrent.conv_width))
        self.conv_weight = filters.float().view(num_channels, recurrent.conv_width).contiguous()
        self.conv_bias = weights.take("bias", (num_channels,)).float() if recurrent.conv_bias else None
        self.step_bias = _vector(build.weights, "dt_bias", recurrent.num_heads)
        self.rates = _vector(build.weights, "A_log", recurrent.num_heads).exp()
        """[heads]: how fast each state decays."""

    def scale_kv(self, norm: Norm) -> None:
        """There are no keys and values."""

    def _state(self, context: StepContext) -> tuple[StateLayer, RecurrentPlan]:
        assert context.recurrence is not None, "a step of a model with recurrent layers has a plan for them"
        return context.state_layers[self.place], context.recurrence

    def _convolve(self, x: Tensor, state: StateLayer, plan: RecurrentPlan) -> Tensor:
        """x [T, channels] -> the same of its convolution, activated."""
        return self.activation(self.kernels.causal_conv(x, self.conv_weight, self.conv_bias, state, plan))


class GatedDeltaNet(_Recurrent):
    """The gated delta rule: a token first removes from the state what its key reads, then writes its value."""

    def __init__(self, build: Builder, layer: int, in_proj: Linear, per_head: Linear, out_proj: Linear) -> None:
        super().__init__(build, layer, in_proj, per_head, out_proj)
        self.norm_weight = _vector(build.weights, "norm.weight", self.recurrent.value_dim)

    def __call__(self, x: Tensor | Normed, context: StepContext) -> Tensor:
        """x [T, H] -> [T, H], or [R, H] of the output tokens."""
        recurrent, dtype = self.recurrent, _dtype(x)
        x = x.compute() if isinstance(x, Normed) else x
        state, plan = self._state(context)
        mixed, z = self.in_proj(x).float().split((recurrent.num_channels, recurrent.inner_size), dim=1)
        strengths, steps = self.per_head(x).float().chunk(2, dim=1)
        num_keys = recurrent.num_key_heads * recurrent.key_dim
        parts = self._convolve(mixed, state, plan).split((num_keys, num_keys, recurrent.inner_size), dim=1)
        q, k = (_normalised(part.view(len(x), -1, recurrent.key_dim)) for part in parts[:2])
        out = self.kernels.gated_delta_rule(
            q.mul_(recurrent.key_dim**-0.5),
            k,
            parts[2].view(len(x), -1, recurrent.value_dim),
            -self.rates * functional.softplus(steps + self.step_bias),
            strengths.sigmoid(),
            state,
            plan,
        )
        out, z = context.select_output(out), context.select_output(z)
        normed = self.kernels.rms_norm(out.view(-1, recurrent.value_dim), self.norm_weight, self.eps)
        return self.out_proj((normed.view(len(z), -1) * functional.silu(z)).to(dtype))


class Mamba2(_Recurrent):
    """The state space model of Mamba-2: a state decays by its time step and adds the token's input along B; C reads it.

    Seen as attention C are the queries, B the keys, and inputs times time steps the values.
    """

    def __init__(self, build: Builder, layer: int, in_proj: Linear, per_head: Linear, out_proj: Linear) -> None:
        super().__init__(build, layer, in_proj, per_head, out_proj)
        self.norm_weight = _vector(build.weights, "norm.weight", self.recurrent.inner_size)
        self.skip = _vector(build.weights, "D", self.recurrent.num_heads)[:, None]

    def __call__(self, x: Tensor | Normed, context: StepContext) -> Tensor:
        """x [T, H] -> [T, H], or [R, H] of the output tokens."""
        recurrent, dtype = self.recurrent, _dtype(x)
        x = x.compute() if isinstance(x, Normed) else x
        state, plan = self._state(context)
        z, mixed = self.in_proj(x).float().split((recurrent.inner_size, recurrent.num_channels), dim=1)
        steps = functional.softplus(self.per_head(x).float() + self.step_bias).clamp(*recurrent.step_limits)
        num_keys = recurrent.num_key_heads * recurrent.key_dim
        parts = self._convolve(mixed, state, plan).split((recurrent.inner_size, num_keys, num_keys), dim=1)
        inputs = parts[0].view(len(x), -1, recurrent.value_dim)
        k, q = (part.view(len(x), -1, recurrent.key_dim) for part in parts[1:])
        out = self.kernels.gated_delta_rule(q, k, inputs * steps.unsqueeze(-1), -self.rates * steps, None, state, plan)
        out = context.select_output(out.add_(inputs * self.skip)).flatten(1)
        gated = out * functional.silu(context.select_output(z))
        groups = gated.view(len(gated), recurrent.num_key_heads, -1)
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return self.out_proj((normed.flatten(1) * self.norm_weight).to(dtype))


def mamba2_or_attention(build: Builder, layer: int, cos_sin: Tensor | None) -> Mamba2 | SelfAttention:
    """What mixes tokens in a layer of a hybrid: `mamba` where the config says recurrent, else `self_attn`."""
    if build.config.is_recurrent(layer):
        return mamba2(build.scope("mamba"), layer)
    return rotary_attention(build.scope("self_attn"), layer, cos_sin)


def mamba2(build: Builder, layer: int) -> Mamba2:
    """A layer whose gate, convolution input and time steps are stored as one matrix, in this order."""
    config, recurrent = build.config, _recurrent(build.config)
    fused_rows = recurrent.inner_size + recurrent.num_channels
    shape = (fused_rows + recurrent.num_heads, config.hidden_size)
    stored = build.weights.take_linear("in_proj", shape, bias=recurrent.bias)
    rows = torch.arange(shape[0], device=stored.weight.device)
    return Mamba2(
        build,
        layer,
        build.pack(stored.select_rows(rows[:fused_rows])),
        build.pack(stored.select_rows(rows[fused_rows:]), quantizes=False),
        build.linear({"out_proj": config.hidden_size}, recurrent.inner_size, bias=recurrent.bias),
    )


def _recurrent(config: ModelConfig) -> RecurrentConfig:
    assert config.recurrent is not None, "only a family with recurrent layers builds them"
    return config.recurrent


def _vector(weights: WeightScope, name: str, size: int) -> Tensor:
    return weights.take(name, (size,)).float()


def _dtype(x: Tensor | Normed) -> torch.dtype:
    return x.residual.dtype if isinstance(x, Normed) else x.dtype


def _normalised(x: Tensor) -> Tensor:
    """x [T, G, K] -> each head's vector with length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
