"""KVGroup: layers that keep the same positions of a sequence, and so share one block table; and KVLayout, all groups.

The KV cache is one pool of blocks of one size. A block holds the keys and values of `block_size` tokens for the layers
of one group. So a model whose layers all see the same positions has one group, and a model with full attention and
sliding windows has several: as a window group needs few blocks, what it does not need serves every other sequence.
Groups have the same number of layers, or the last one of a kind fewer; what it leaves of its blocks is lost and
counted. No torch.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quire.errors import ConfigError
from quire.layer_spec import KVSpec, ModelSpec

INVARIANT_ALIGNMENT = 256
"""A batch-invariant plan begins at multiples of this many keys. csrc/attention.h takes as many at a time, so the keys
of a window are summed in the same groups wherever the step begins."""

_FULL_PADDING = 8
"""Weight of an unused layer's place in a group of full attention: at long contexts it is unused in nearly
every block, in a window group in a few."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """One group. `window` is the number of positions that a token attends to, itself included; 0: all."""

    kind: str
    """The kind of its layers' `KVSpec`."""
    window: int
    layers: tuple[int, ...]
    """Its layers, ascending, counted among those that have keys and values. The i-th keeps them in the i-th part of a
    block."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The groups of a model, those of full attention first, and the rows that each layer keeps."""

    groups: tuple[KVGroup, ...]
    row: KVSpec
    """What a token leaves in one layer."""
    keeps_all: bool = False
    """No block is given back while its sequence runs, in spite of windows: an encoder's texts run for one step."""

    @classmethod
    def of(cls, spec: ModelSpec) -> "KVLayout":
        """The layout for a model. Raises `ConfigError` where layers keep rows of different sizes."""
        if spec.all_kvs:
            return cls.of_layers(spec.all_kvs, dealt=True)._part(spec.first_kv, len(spec.kvs))
        return replace(cls.of_layers(spec.kvs), keeps_all=spec.is_encoder)

    @classmethod
    def of_layers(cls, layers: Sequence[KVSpec], *, dealt: bool = False) -> "KVLayout":
        """The layout for layers that keep these rows. `dealt`: layers of a kind go to its groups in turn, so that any
        stage of the model has about as many layers of each group."""
        sizes = {(kv.num_heads, kv.key_dim, kv.value_dim) for kv in layers}
        if len(sizes) > 1:
            found = " and ".join(f"{heads} heads of {key} + {value}" for heads, key, value in sorted(sizes))
            raise ConfigError(f"layers keep keys and values of {found} elements; supported is one size for all layers")
        kinds: dict[int, list[int]] = {}
        for index, kv in enumerate(layers):
            kinds.setdefault(kv.window, []).append(index)
        # Full attention first, then the widest window.
        windows = sorted(kinds, key=lambda window: -window if window else float("-inf"))
        size = _layers_per_group({window: len(indices) for window, indices in kinds.items()})
        groups = [
            KVGroup(layers[kinds[window][0]].kind, window, tuple(members))
            for window in windows
            for members in _divide(kinds[window], size, dealt=dealt)
        ]
        return cls(tuple(groups), layers[0])

    def _part(self, first: int, count: int) -> "KVLayout":
        """The same groups with `count` layers from `first` on alone; a group may be left with none."""
        own = range(first, first + count)
        groups = (
            replace(group, layers=tuple(layer - first for layer in group.layers if layer in own))
            for group in self.groups
        )
        return replace(self, groups=tuple(groups))

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each group; blocks outside are given back."""
        return tuple(0 if self.keeps_all else group.window for group in self.groups)

    @property
    def layers_per_block(self) -> int:
        """Layers whose keys and values a block has room for."""
        return max(len(group.layers) for group in self.groups)

    def block_bytes(self, block_size: int, dtype: str) -> int:
        """Memory of one block."""
        return block_size * self.layers_per_block * self.row.bytes_per_token(dtype)

    def most_blocks(self, num_tokens: int, block_size: int, alignment: int = 1) -> int:
        """The most blocks that a sequence of at most `num_tokens` tokens must hold at once, in all groups."""
        return sum(most_blocks(num_tokens, window, block_size, alignment) for window in self.windows)

    def longest(self, num_blocks: int, most: int, block_size: int, alignment: int = 1) -> int:
        """The most tokens of a sequence, up to `most`, for which `num_blocks` blocks suffice."""

        def needed(blocks: int) -> int:
            return self.most_blocks(blocks * block_size, block_size, alignment)

        fitting = bisect_right(range(1, -(-most // block_size) + 1), num_blocks, key=needed)
        return min(most, fitting * block_size)


def describe_groups(groups: Sequence[KVGroup]) -> str:
    """The groups in words: 7 groups of up to 4 layers (1 full, 6 window 512)."""
    counts = Counter(f"window {group.window}" if group.window else group.kind for group in groups)
    kinds = ", ".join(f"{count} {name}" for name, count in counts.items())
    plural, most = "s" * (len(groups) > 1), max(len(group.layers) for group in groups)
    return f"{len(groups)} group{plural} of up to {most} layers ({kinds})"


def first_kept_block(position: int, window: int, block_size: int, alignment: int = 1) -> int:
    """The first logical block that the token at `position` reads, and so the first that its sequence must still hold.

    Kernels that take keys by `alignment` at a time also read the keys of their first step that no token sees.
    """
    if not window:
        return 0
    return max(0, position - window + 1) // alignment * alignment // block_size


def most_blocks(num_tokens: int, window: int, block_size: int, alignment: int = 1) -> int:
    """The most blocks that a sequence of at most `num_tokens` tokens must hold at once in one group."""
    blocks = -(-num_tokens // block_size)
    return min(blocks, -(-(window + alignment - 2) // block_size) + 1) if window else blocks


def window_alignment(block_size: int, *, batch_invariant: bool) -> int:
    """The `alignment` of this engine: batch-invariant plans begin at multiples of 256 keys, and pairs of bfloat16 at
    even ones, which matters where blocks begin at odd ones."""
    return INVARIANT_ALIGNMENT if batch_invariant else 1 + block_size % 2


def _divide(layers: list[int], size: int, *, dealt: bool) -> list[list[int]]:
    """Groups of at most `size` layers."""
    number = -(-len(layers) // size)
    if dealt:
        return [layers[place::number] for place in range(number)]
    return [layers[first : first + size] for first in range(0, len(layers), size)]


def _layers_per_group(num_layers: dict[int, int]) -> int:
    """How many layers a group takes, given the number of layers of each window: few groups, little unused memory."""

    def cost(size: int) -> int:
        groups = {window: -(-count // size) for window, count in num_layers.items()}
        lost = groups.get(0, 0) * size - num_layers.get(0, 0)
        return sum(groups.values()) * (size + 1) + _FULL_PADDING * lost

    return min(range(1, max(num_layers.values()) + 1), key=lambda size: (cost(size), -size))
