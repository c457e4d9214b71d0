"""BuddyAllocator against its definition: chunks are aligned, never overlap, and nothing is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.simulation.buddy import BuddyAllocator


@given(st.integers(1, 3000), st.lists(st.one_of(st.integers(1, 700), st.just(0)), max_size=120), st.randoms())
def test_chunks_are_aligned_and_apart(num_slots: int, asked: list[int], draw) -> None:  # type: ignore[no-untyped-def]
    memory = BuddyAllocator(num_slots)
    held: list[tuple[int, int]] = []
    for size in asked:
        if size:
            order = memory.order_for(size)
            assert 2**order >= size > 2**order // 2
            chunk = memory.allocate(order)
            if chunk is not None:
                assert chunk[1] == order
                assert chunk[0] % 2**order == 0
                held.append(chunk)
            else:
                # Refused only if no aligned place of that size is free.
                taken = {slot for offset, size in held for slot in range(offset, offset + 2**size)}
                places = range(0, num_slots - 2**order + 1, 2**order)
                assert all(taken & set(range(place, place + 2**order)) for place in places)
        elif held:
            memory.free(held.pop(draw.randrange(len(held))))
        slots = [slot for offset, order in held for slot in range(offset, offset + 2**order)]
        assert len(slots) == len(set(slots))
        assert all(slot < num_slots for slot in slots)
        assert memory.num_free() + len(slots) == num_slots
    for chunk in held:
        memory.free(chunk)
    for order in range(memory.largest_order + 1):
        fresh = BuddyAllocator(num_slots)
        chunks = [fresh.allocate(order) for _ in range(fresh.capacity(order) + 1)]
        again = [memory.allocate(order) for _ in range(memory.capacity(order) + 1)]
        assert [chunk is None for chunk in chunks] == [chunk is None for chunk in again]
        assert chunks[-1] is None
        assert None not in chunks[:-1]
        for chunk in again[:-1]:
            assert chunk is not None
            memory.free(chunk)


@pytest.mark.parametrize(("slots", "fit"), [(15728, 7), (9557, 4), (60074, 29), (2048, 1), (2047, 0)])
def test_how_many_of_the_longest_fit(slots: int, fit: int) -> None:
    assert BuddyAllocator(slots).capacity(11) == fit
