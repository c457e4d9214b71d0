"""CodedMatrix: a matrix of few bits as checkpoints store it, codes that stand for numbers, and scales of groups."""

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


def _of_inputs(groups: Tensor, group_size: int, num_inputs: int) -> Tensor:
    """groups [N, G] -> [N, K]: the value of each input's group."""
    return groups.repeat_interleave(min(group_size, num_inputs), dim=1)[:, :num_inputs]
