"""DeviceWeights: a checkpoint's tensors on a device, each copied there when a model takes it.

From the mapped file a tensor passes through two pinned buffers, in pieces: while the device fetches one, the host reads
the next from the file. So loading takes no host memory beyond the buffers, and the device never waits for a whole file.
"""

from dataclasses import replace

import torch
from torch import Tensor

from quire.layers.linear import LinearWeight
from quire.models.source_around import SourceAround
from quire.models.weights import TensorSource

STAGING_BYTES = 64 * 2**20
"""Bytes of each buffer: large enough for the full rate of a bus, small enough for any host."""


class DeviceWeights(SourceAround):
    """A TensorSource whose tensors lie on `device`, float tensors as `dtype`, in which the model also computes."""

    def __init__(self, source: TensorSource, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(source)
        self._dtype = dtype
        self.device = device
        self._upload = Upload(device)

    @property
    def activation_dtype(self) -> torch.dtype:
        return self._dtype

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._send(self._source.take(name, shape))

    def take_bytes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._upload(self._source.take_bytes(name, shape))

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        stored = self._source.take_linear(name, shape, bias=bias, transposed=transposed)
        sent = None if stored.bias is None else self._send(stored.bias)
        return replace(stored, weight=self._send(stored.floats()), bias=sent)

    def _send(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":  # random weights are made on the device
            tensor = self._upload(tensor)
        return tensor.to(self._dtype)


class Upload:
    """Copies tensors from the host to a device."""

    def __init__(self, device: torch.device, staging_bytes: int = STAGING_BYTES) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._buffers = [torch.empty(staging_bytes, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(2)]
        self._fetched: list[torch.cuda.Event | None] = [None, None]
        """For each buffer, the event after which the device has fetched its last content."""
        self._turn = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` on the device, of the same dtype."""
        copied = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        if not tensor.numel():
            return copied
        source, target = (x.view(-1).view(torch.uint8) for x in (tensor.contiguous(), copied))
        size = len(self._buffers[0])
        for piece, place in zip(source.split(size), target.split(size), strict=True):
            fetched = self._fetched[self._turn]
            if fetched is not None:
                fetched.synchronize()
            buffer = self._buffers[self._turn][: len(piece)]
            buffer.copy_(piece)
            place.copy_(buffer, non_blocking=self._pinned)
            if self._pinned:
                fetched = self._fetched[self._turn] = torch.cuda.Event()
                fetched.record()
            self._turn = 1 - self._turn
        return copied
