"""CodedMatrix and CodedWeight: weights of few bits as checkpoints store them, codes of numbers, and scales."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quire.quantization.levels import Levels


@dataclass(frozen=True, slots=True)
class CodedMatrix:
    """A matrix [N, K]: W[n, k] = levels[codes[n, k]] * scales[n, g] + shift[n, g], g = k // group_size."""

    codes: Tensor
    """[N, K] uint8."""
    scales: Tensor
    """[N, G] of a float type."""
    group_size: int
    """Inputs that share a scale: a multiple of 8, or at least K."""
    levels: Levels
    zeros: Tensor | None = None
    """[N, G], of the type of `scales`: zero points; a group's shift is its zero point times -scale."""
    shifts: Tensor | None = None
    """[N, G], of the type of `scales`: the shifts themselves. At most one of the two is given."""
    order: Tensor | None = None
    """[K]: input k of the matrix is input order[k] of the layer; None: as they are."""

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def form(self) -> tuple[object, ...]:
        """What matrices have in common that one weight can hold."""
        return (
            self.levels,
            min(self.group_size, self.shape[1]),
            self.scales.dtype,
            self.zeros is None,
            self.shifts is None,
        )

    @property
    def offsets(self) -> Tensor | None:
        """Zero points or shifts, whichever there are."""
        return self.shifts if self.zeros is None else self.zeros

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Tensor) -> "CodedMatrix":
        """The outputs `rows`, in their order."""
        return replace(
            self,
            codes=self.codes[rows],
            scales=self.scales[rows],
            zeros=None if self.zeros is None else self.zeros[rows],
            shifts=None if self.shifts is None else self.shifts[rows],
        )

    def group_shifts(self) -> Tensor | None:
        """[N, G] float32: what is added to every number of a group."""
        if self.zeros is not None:
            return self.zeros.float() * -self.scales.float()
        return None if self.shifts is None else self.shifts.float()

    def dequantize(self) -> Tensor:
        """[N, K] float32, inputs in the layer's own order."""
        num_inputs = self.shape[1]
        numbers = torch.tensor(self.levels, device=self.device)[self.codes.int()]
        weight = numbers * _of_inputs(self.scales.float(), self.group_size, num_inputs)
        shifts = self.group_shifts()
        if shifts is not None:
            weight += _of_inputs(shifts, self.group_size, num_inputs)
        if self.order is None:
            return weight
        restored = torch.empty_like(weight)
        restored[:, self.order] = weight
        return restored


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """Weight of a dense layer that keeps the bits of its checkpoint. Each kernel module has its own layout; in
    `reference` it is that of `CodedMatrix`."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    """Zero points or shifts of groups, of the type of `scales`."""
    zero_points: bool
    """Which of the two they are."""
    group_size: int
    levels: Levels
    order: Tensor | None
    """[K] int32"""

    @property
    def nbytes(self) -> int:
        tensors = (self.codes, self.scales, self.offsets, self.order)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def can_join(matrices: Sequence[CodedMatrix]) -> bool:
    """Whether one weight can hold these matrices side by side."""
    first = matrices[0]

    def same_order(order: Tensor | None) -> bool:
        if first.order is None or order is None:
            return order is first.order
        return torch.equal(order, first.order)

    return all(
        each.form == first.form and each.shape[1] == first.shape[1] and same_order(each.order) for each in matrices
    )


def join(matrices: Sequence[CodedMatrix]) -> CodedMatrix:
    """Matrices [N_i, K] that `can_join` -> one of all their outputs."""
    if len(matrices) == 1:
        return matrices[0]
    zeros = [each.zeros for each in matrices if each.zeros is not None]
    shifts = [each.shifts for each in matrices if each.shifts is not None]
    return replace(
        matrices[0],
        codes=torch.cat([each.codes for each in matrices]),
        scales=torch.cat([each.scales for each in matrices]),
        zeros=torch.cat(zeros) if zeros else None,
        shifts=torch.cat(shifts) if shifts else None,
    )


def _of_inputs(groups: Tensor, group_size: int, num_inputs: int) -> Tensor:
    """groups [N, G] -> [N, K]: the value of each input's group."""
    return groups.repeat_interleave(min(group_size, num_inputs), dim=1)[:, :num_inputs]
