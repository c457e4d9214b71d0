"""BuddyAllocator: contiguous chunks of 2^k slots, as the paper's baselines allocate KV memory."""

from collections.abc import Iterator


class BuddyAllocator:
    """`num_slots` slots, cut into pieces of powers of two, the largest first; a chunk never spans two pieces.

    A chunk is (offset, order): 2^order slots beginning at `offset`, a multiple of the chunk's size.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.largest_order = num_slots.bit_length() - 1
        # Dicts without values: sets whose order is that of insertion, whatever the interpreter.
        self._free: list[dict[int, None]] = [{} for _ in range(self.largest_order + 1)]
        offset = 0
        for order in range(self.largest_order, -1, -1):
            if num_slots >> order & 1:
                self._free[order][offset] = None
                offset += 1 << order

    @staticmethod
    def order_for(num_slots: int) -> int:
        """The order of the smallest chunk that holds `num_slots` ≥ 1."""
        return (num_slots - 1).bit_length()

    def capacity(self, order: int) -> int:
        """Number of chunks of an order when all slots are free."""
        return self.num_slots >> order

    def allocate(self, order: int) -> tuple[int, int] | None:
        """A chunk cut from the smallest free one that holds it; None if there is none."""
        for source in range(order, self.largest_order + 1):
            if self._free[source]:
                offset, _ = self._free[source].popitem()
                for half in range(source - 1, order - 1, -1):
                    self._free[half][offset + (1 << half)] = None
                return offset, order
        return None

    def free(self, chunk: tuple[int, int]) -> None:
        """Free a chunk and merge it with its buddy for as long as the buddy is free too."""
        offset, order = chunk
        # A whole piece never finds a buddy, since the slots there belong to smaller pieces.
        while order < self.largest_order and (offset ^ (1 << order)) in self._free[order]:
            del self._free[order][offset ^ (1 << order)]
            offset &= ~(1 << order)
            order += 1
        self._free[order][offset] = None

    def free_chunks(self) -> Iterator[tuple[int, int]]:
        """Every free chunk."""
        for order, chunks in enumerate(self._free):
            for offset in chunks:
                yield offset, order

    def num_free(self) -> int:
        """Slots in free chunks."""
        return sum(len(chunks) << order for order, chunks in enumerate(self._free))
