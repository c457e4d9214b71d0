"""Ranks: the processes that hold one model together, and what layers need of the others: sums and other columns."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A rank that dies is seen at once; this bounds one that stands still where no watchdog looks."""


def meet(meeting_file: Path, rank: int, size: int, device: torch.device) -> Any:
    """The process group of those that meet at a file; all wait for each other. NCCL joins cards, gloo everything
    else. A group of its own is used, so several models can live in one process."""
    store = dist.FileStore(str(meeting_file), size)  # type: ignore[attr-defined]  # documented
    if device.type == "cuda":
        torch.cuda.set_device(device)
        return dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
    return dist.ProcessGroupGloo(store, rank, size, COLLECTIVE_TIMEOUT)


class Ranks:
    """This process's rank among `size`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._group: Any = None
        """A process group: gloo's and NCCL's have no type in common."""

    def connect(self, meeting_file: Path, device: torch.device) -> None:
        """Meet the other ranks. All wait for each other here."""
        self._group = meet(meeting_file, self.rank, self.size, device)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors of one shape, in place; the same bits on all ranks."""
        assert self._group is not None, "ranks compute after they have met"
        self._group.allreduce([x]).wait()
        return x

    def gather(self, x: Tensor) -> Tensor:
        """x [R, N] of every rank -> [R, size * N], the ranks' columns side by side."""
        assert self._group is not None, "ranks compute after they have met"
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._group.allgather([parts], [x]).wait()
        return torch.cat(parts, dim=1)
