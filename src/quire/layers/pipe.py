"""Pipe: how a stage of a model gets the residual stream from the stage before it, and passes it on."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.layer_stage import Stage
from quire.layers.ranks import meet


class Pipe:
    """This process's stage. The others are other ranks."""

    def __init__(self, stage: Stage, width: int, dtype: torch.dtype) -> None:
        """`width` and `dtype` are those of the residual stream."""
        self.stage = stage
        self._width = width
        self._dtype = dtype
        self._group: Any = None

    def connect(self, meeting_file: Path, device: torch.device) -> None:
        """Meet the other stages. All wait for each other here."""
        self._group = meet(meeting_file, self.stage.index, self.stage.size, device)

    def receive(self, num_tokens: int, device: torch.device) -> Tensor:
        """The residual stream [num_tokens, width] of a step, after the layers of the stage before this one."""
        assert self._group is not None, "stages compute after they have met"
        x = torch.empty(num_tokens, self._width, dtype=self._dtype, device=device)
        self._group.recv([x], self.stage.index - 1, 0).wait()
        return x

    def send(self, x: Tensor) -> None:
        """Pass the residual stream [T, width] on to the next stage. Waits until `x` may be changed."""
        assert self._group is not None, "stages compute after they have met"
        self._group.send([x.contiguous()], self.stage.index + 1, 0).wait()
