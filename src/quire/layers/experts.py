"""ExpertMLPs: the gated MLPs of a layer's experts, packed as one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels import Kernels
from quire.kernels.expert_forms import alike
from quire.kernels.interface import ExpertMatrices, PackedExperts, Packing
from quire.layers.linear import LinearWeight, join_biases, stored_as
from quire.layers.ranks import Ranks
from quire.quantization import WeightFormat


@dataclass(frozen=True, slots=True)
class ExpertLinear:
    """One dense layer of all E experts, as a checkpoint stores it."""

    matrices: ExpertMatrices
    """For each expert, the matrices [N_i, K] whose outputs lie side by side."""
    bias: Tensor | None = None
    """[E, N] of any float type."""

    @classmethod
    def of(cls, experts: Sequence[Sequence[LinearWeight]]) -> "ExpertLinear":
        """Experts whose layers are stored one by one."""
        biases = [join_biases(parts) for parts in experts]
        return cls(
            [[part.weight for part in parts] for parts in experts],
            None
            if any(bias is None for bias in biases)
            else torch.stack([bias for bias in biases if bias is not None]),
        )


class ExpertMLPs:
    """down(activation(gate(x)) * up(x)) of all experts. The weights are packed when this is built, one expert after the
    other, into one tensor for each of the two layers."""

    __slots__ = ("kernels", "packed", "ranks")

    def __init__(
        self,
        kernels: Kernels,
        gate_up: ExpertLinear,
        down: ExpertLinear,
        num_inner: int,
        activation: str,
        dtype: str | WeightFormat,
        packing: Packing | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`gate_up` [2 I, H] and `down` [H, I]; I is `num_inner`. `packing` packs them; by default `kernels` do.
        `ranks` have other parts of I."""
        self.kernels = kernels
        self.ranks = ranks
        packing, stored = packing or kernels, stored_as(dtype)
        matrices = alike(gate_up.matrices, down.matrices, stored)
        self.packed = PackedExperts(
            packing.pack_experts(matrices[0], stored),
            packing.pack_experts(matrices[1], stored),
            None if gate_up.bias is None else gate_up.bias.float(),
            None if down.bias is None else down.bias.float(),
            num_experts=len(gate_up.matrices),
            num_inner=num_inner,
            activation=activation,
        )

    def add_to(self, out: Tensor, x: Tensor, weights: Tensor, chosen: Tensor) -> None:
        """x, out [T, H], weights, chosen [T, A]: adds to each row of `out` the outputs of the experts chosen for the
        row of x, times their weights."""
        if self.ranks is None:
            self.kernels.experts(x, chosen.int(), weights, self.packed, out)
            return
        own = torch.zeros_like(out)
        self.kernels.experts(x, chosen.int(), weights, self.packed, own)
        out += self.ranks.sum(own)
