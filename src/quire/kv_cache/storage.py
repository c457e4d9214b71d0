"""KVCache: the tensors behind the blocks, allocated once at start. The only file of `kv_cache` that imports torch.

The kernels decide the layout of a block (`Kernels.kv_cache_shapes`, see docs/decisions). Here, the first dimension of
keys and of values must be the block.
"""

import itertools
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from quire.kernels import KVLayer
from quire.kernels.interface import StateLayer
from quire.kv_groups import KVGroup
from quire.layer_spec import RecurrentSpec

CPU = torch.device("cpu")
_PAGE = 4096
_HUGE_PAGE = 2 << 20


class KVCache:
    """The blocks of all KV groups, zero at first. On a CPU a block takes no memory until it is first written.

    A block has a part for each layer of the largest group. The i-th layer of any group has the i-th part of the blocks
    that its group holds, so layers of several groups share one pair of tensors.
    """

    def __init__(
        self,
        *,
        groups: Sequence[KVGroup],
        shapes: Sequence[tuple[int, ...]],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
        make_layer: Callable[..., KVLayer] = KVLayer,
        states: "StateCache | None" = None,
    ) -> None:
        """`shapes` are the shapes of one layer's keys and values, or of its latent rows, each [num_blocks, ...].
        `make_layer` makes the layer of these tensors."""
        num_blocks = shapes[0][0]
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.states = states
        """The states of recurrent layers; None in a model without."""
        self.element_size = dtype.itemsize
        self.groups = tuple(groups)
        num_parts = max(len(group.layers) for group in groups)
        tensors = _zeros(num_parts * [*shapes], dtype, device)
        self.parts = [
            make_layer(*tensors[first : first + len(shapes)]) for first in range(0, len(tensors), len(shapes))
        ]
        """The memory, each part once."""
        placed = {
            layer: replace(self.parts[place], group=index)
            for index, group in enumerate(groups)
            for place, layer in enumerate(group.layers)
        }
        self.layers = [placed[layer] for layer in range(len(placed))]
        """The part of each layer of the model."""
        self._bytes = [tensor.view(num_blocks, -1).view(torch.uint8) for tensor in tensors]
        """All tensors as [num_blocks, bytes per block]."""
        self.block_bytes = sum(tensor.shape[1] for tensor in self._bytes)
        """Size of a block's keys and values in the layers of a group."""

    def num_bytes(self, block: int) -> int:
        """The size of a block. An index past the blocks is that of a recurrent state: `num_blocks` + its slot."""
        if block < self.num_blocks:
            return self.block_bytes
        assert self.states is not None, "only a model with recurrent layers has states"
        return self.states.slot_bytes

    def copy_out(self, block: int, out: torch.Tensor) -> None:
        """Copy a block, or a state, to `out`, uint8 [num_bytes]: keys, then values, part after part.

        A copy to pinned memory is asynchronous. It is done before the device's next step; then `copy_in` may read it.
        """
        first = 0
        for content in self._contents(block):
            out[first : first + len(content)].copy_(content, non_blocking=out.is_pinned())
            first += len(content)

    def synchronize(self) -> None:
        """Wait until a device has made its copies."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def copy_in(self, block: int, content: torch.Tensor) -> None:
        """Overwrite a block, or a state, with content from `copy_out`."""
        first = 0
        for own in self._contents(block):
            own.copy_(content[first : first + len(own)], non_blocking=content.is_pinned())
            first += len(own)

    def _contents(self, block: int) -> Sequence[torch.Tensor]:
        if block < self.num_blocks:
            return [tensor[block] for tensor in self._bytes]
        assert self.states is not None, "only a model with recurrent layers has states"
        return self.states.contents(block - self.num_blocks)


class StateCache:
    """The recurrent states of all layers that have one, in slots. On a CPU a slot takes no memory until it is
    written."""

    def __init__(self, layers: Sequence[RecurrentSpec], num_slots: int, device: torch.device = CPU) -> None:
        shapes: list[tuple[int, ...]] = []
        for layer in layers:
            shapes.append((num_slots, layer.conv_width - 1, layer.num_channels))
            shapes.append((num_slots, layer.num_heads, layer.key_dim, layer.value_dim))
        self._tensors = _zeros(shapes, torch.float32, device)
        self.layers = [StateLayer(*pair) for pair in zip(self._tensors[::2], self._tensors[1::2], strict=True)]
        self.conv_width = layers[0].conv_width
        """The same in every layer."""
        self._bytes = [tensor.view(num_slots, -1).view(torch.uint8) for tensor in self._tensors]
        self.slot_bytes = sum(tensor.shape[1] for tensor in self._bytes)

    def contents(self, slot: int) -> Sequence[torch.Tensor]:
        """The bytes of a state, tensor after tensor."""
        return [tensor[slot] for tensor in self._bytes]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy states from slot to slot, one pair after the other; source -1 is the state before the first token."""
        for source, destination in pairs:
            for tensor in self._tensors:
                if source < 0:
                    tensor[destination].zero_()
                else:
                    tensor[destination].copy_(tensor[source])


def lazy_zeros(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] in pages that the system provides when they are written.

    torch.zeros would write all of them, and so take their memory at once; malloc might keep them when they are freed.
    This does not ask for huge pages: if a hypervisor must find them, a prompt waits longer for them than its attention
    gains from them (docs/log.md).
    """
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes]


def _zeros(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    if device.type != "cpu":
        stored = torch.uint8 if dtype.itemsize == 1 else dtype
        return [torch.zeros(shape, dtype=stored, device=device).view(dtype) for shape in shapes]
    # Blocks are used from the first on, in every tensor. If the system uses huge pages unasked, a new one can take
    # milliseconds. So each tensor starts at another offset in its huge page, and a step enters new ones in few tensors.
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    step = _HUGE_PAGE // len(sizes) // _PAGE * _PAGE
    strides = [-(-size // _HUGE_PAGE) * _HUGE_PAGE + step for size in sizes]
    memory = lazy_zeros(sum(strides))
    begins = [0, *itertools.accumulate(strides)]
    return [
        memory[begin : begin + size].view(dtype).view(shape)
        for begin, size, shape in zip(begins, sizes, shapes, strict=False)
    ]
