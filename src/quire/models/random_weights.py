"""RandomWeights: a source for measuring without a checkpoint (load_format="dummy")."""

import re
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from quire.layers.linear import LinearWeight
from quire.models.weights import take_float_linear

_ABSENT = re.compile(r"_scale$|\.eh_proj\.weight$|(^|\.)(lm_head|embed_out|output)\.weight$")
"""What a checkpoint may lack: scales of a KV cache, the head of a tied model, further layers."""


class RandomWeights:
    """Weights of whatever shape is asked for, at a sensible scale.

    A tensor depends on the seed, its name and the kind of device alone, whatever the order of taking.
    """

    activation_dtype = torch.float32

    def __init__(self, seed: int = 0, device: torch.device | None = None) -> None:
        self._seed = seed
        self._device = device or torch.device("cpu")

    def has(self, name: str) -> bool:
        return _ABSENT.search(name) is None

    def shape_of(self, name: str) -> tuple[int, ...]:
        raise KeyError(f"{name}: random weights have whatever shape they are asked for")

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape, device=self._device)
        if len(shape) == 1:
            return torch.ones(shape, device=self._device)  # the weight of a norm
        generator = torch.Generator(self._device).manual_seed(self._seed_of(name))
        return torch.empty(shape, device=self._device).normal_(0.0, 0.02, generator=generator)

    def take_bytes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Bytes of MXFP4: any numbers of 4 bits, with scales that make them as large as weights are."""
        generator = torch.Generator().manual_seed(self._seed_of(name))
        if name.endswith("_scales"):
            return torch.randint(118, 122, shape, dtype=torch.uint8, generator=generator)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        return take_float_linear(self, name, shape, bias=bias, transposed=transposed)

    def _seed_of(self, name: str) -> int:
        return zlib.crc32(f"{self._seed}/{name}".encode())

    def release(self, tensor: Tensor) -> None:
        """No file is mapped."""

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Nothing is ever left over."""
