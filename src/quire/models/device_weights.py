"""DeviceWeights: a checkpoint's tensors on a device, each copied there when a model takes it.

From the mapped file a tensor passes through two pinned buffers, in pieces: while the device fetches one, the host reads
the next from the file. So loading takes no host memory beyond the buffers, and the device never waits for a whole file.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from quire.models.weights import RandomWeights, Weights

STAGING_BYTES = 64 * 2**20
"""Of each buffer: large enough for the full rate of a bus, small enough for any host."""


class DeviceWeights:
    """A TensorSource whose tensors lie on `device`, float tensors as `dtype`, in which the model also computes."""

    def __init__(
        self, source: Weights | RandomWeights, device: torch.device, dtype: torch.dtype, upload: "Upload | None" = None
    ) -> None:
        self.activations = dtype
        self._source = source
        self._device = device
        self._upload = upload or Upload(device)

    def scope(self, prefix: str) -> "DeviceWeights":
        return DeviceWeights(self._source.scope(prefix), self._device, self.activations, self._upload)

    def has(self, name: str) -> bool:
        return self._source.has(name)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._source.shape_of(name)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._source.take(name, shape)
        if tensor.device.type == "cpu":
            tensor = self._upload(tensor)
        return tensor.to(self.activations)

    def finish(self, ignored: Iterable[str] = ()) -> None:
        self._source.finish(ignored)


class Upload:
    """Copies tensors from the host to a device."""

    def __init__(self, device: torch.device, staging_bytes: int = STAGING_BYTES) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._buffers = [torch.empty(staging_bytes, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(2)]
        self._fetched: list[torch.cuda.Event | None] = [None, None]
        """When the device has fetched what each buffer held last."""
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
