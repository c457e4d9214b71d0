"""Slots of recurrent states by example, then by a state machine that checks what every slot holds."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.kv_cache.block_hash import root_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.block_table import BlockTable
from quire.kv_cache.states import ZERO_STATE, FoundState, OutOfStatesError, StatePool
from quire.request import InputSpan

SIZE = 4
BLOCKS = BlockPool(0, SIZE)


def table_of(salt: str = "", inputs: tuple[InputSpan, ...] = ()) -> BlockTable:
    return BlockTable(BLOCKS, root_hash(salt, SIZE), inputs)


def snapshot(pool: StatePool, token_ids: list[int], salt: str = "") -> int:
    """A sequence that ends after these tokens leaves its state."""
    slot = pool.take()
    pool.keep(slot, table_of(salt), token_ids, len(token_ids))
    return slot


def test_the_longest_beginning_is_found() -> None:
    pool = StatePool(8, 1)
    tokens = list(range(11))
    for length in (3, 4, 6, 8):
        snapshot(pool, tokens[:length])
    snapshot(pool, [0, 1, 2, 3, 4, 99])
    found = [pool.find(table_of(), tokens, limit) for limit in range(12)]
    lengths = [0 if each is None else each.num_tokens for each in found]
    assert lengths == [0, 0, 0, 3, 4, 4, 6, 6, 8, 8, 8, 8]
    assert pool.find(table_of("b"), tokens, 11) is None, "another tenant's"


@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE])
def test_inputs_are_part_of_a_name(length: int) -> None:
    pool, tokens = StatePool(2, 1), [7] * (3 * SIZE + 1)
    image, other = (InputSpan(content, 0, 3 * SIZE) for content in (b"cat", b"dog"))
    pool.keep(pool.take(), table_of(inputs=(image,)), tokens, length)
    assert pool.find(table_of(inputs=(other,)), tokens, 3 * SIZE) is None
    found = pool.find(table_of(inputs=(image,)), tokens, 3 * SIZE)
    assert found is not None
    assert found.num_tokens == length


def test_the_least_recently_used_snapshot_makes_room() -> None:
    pool = StatePool(3, 1)
    slots = [snapshot(pool, [number] * 5) for number in range(3)]
    assert pool.find(table_of(), [0] * 9, 8) == FoundState(5, slots[0])
    assert pool.take() == slots[1]
    assert (pool.report().num_snapshots, pool.stats.total_evicted) == (2, 1)
    assert pool.find(table_of(), [1] * 9, 8) is None


def test_a_sequence_may_start_in_the_slot_of_the_last_snapshot() -> None:
    pool = StatePool(1, 1)
    slot = snapshot(pool, [1] * 5)
    pool.take_copies()
    assert pool.take(slot) == slot
    assert pool.copies == [], "the state is there already"
    assert pool.find(table_of(), [1] * 9, 8) is None, "its owner overwrites it"


def test_a_state_is_kept_once() -> None:
    pool = StatePool(4, 2)
    first = snapshot(pool, [1] * 5)
    snapshot(pool, [1] * 5)
    assert pool.report().num_snapshots == pool.stats.total_saved == 1
    assert pool.find(table_of(), [1] * 9, 8) == FoundState(5, first)


def test_saves_leave_a_slot_for_every_sequence() -> None:
    pool = StatePool(3, 2)
    held = pool.hold()
    assert held is not None
    assert pool.hold() is None
    pool.take()
    pool.take()
    with pytest.raises(OutOfStatesError, match="all 3 slots"):
        pool.take()
    pool.drop(held)
    assert pool.hold() is not None
    assert pool.stats.total_skipped == 1


def test_a_sequence_goes_on_in_a_held_slot() -> None:
    pool = StatePool(5, 1)
    own = pool.take()
    assert pool.num_for_drafts == 2, "half of what snapshots have"
    held = pool.hold()
    assert held is not None
    assert pool.num_for_drafts == 1
    assert pool.exchange(own, held) == held
    assert (pool.num_for_drafts, own in pool._free) == (2, True)
    pool.keep(held, table_of(), [1] * 5, 5)
    assert pool.find(table_of(), [1] * 6, 5) == FoundState(5, held)


def test_listeners_hear_of_states_after_full_blocks() -> None:
    pool, heard = StatePool(2, 1), list[tuple[str, int]]()
    pool.kept_listeners.append(lambda slot, name: heard.append(("kept", slot)))
    pool.eviction_listeners.append(lambda slot, name: heard.append(("evicted", slot)))
    inside, whole = snapshot(pool, [1] * 5), snapshot(pool, [2] * SIZE)
    assert heard == [("kept", whole)]
    assert [pool.take(), pool.take()] == [inside, whole]
    assert heard == [("kept", whole), ("evicted", whole)]


def test_the_origin_of_a_state_is_where_it_lies_before_the_copies() -> None:
    pool = StatePool(4, 4)
    first, second, third = (pool.take(None) for _ in range(3))
    pool.copy(first, second)
    pool.copy(second, third)
    assert [pool.origin(slot) for slot in (first, second, third)] == [first, first, first]
    pool.take_copies()
    assert pool.origin(third) == third


def test_pinned_snapshots_stay_and_have_further_names() -> None:
    pool, tokens = StatePool(3, 1), [1] * (2 * SIZE)
    name, alias = table_of().prefix_hash(tokens, 2 * SIZE), table_of("b").prefix_hash(tokens, 2 * SIZE)
    slot = snapshot(pool, tokens)
    pool.pin(name)
    pool.set_aliases({alias: name})
    for number in range(5):
        snapshot(pool, [2, number])
    pool.clear()
    pool.forget([name])
    assert pool.find(table_of(), [*tokens, 5], 2 * SIZE) == FoundState(2 * SIZE, slot)
    assert pool.find(table_of("b"), [*tokens, 5], 2 * SIZE) == FoundState(2 * SIZE, slot)
    assert (pool.report().num_pinned, pool.report().num_snapshots) == (1, 1)
    pool.unpin(name)
    pool.clear()
    assert pool.find(table_of(), [*tokens, 5], 2 * SIZE) is None


def test_too_few_slots() -> None:
    with pytest.raises(ValueError, match="3 sequences run at once, and there are 2 slots"):
        StatePool(2, 3)


# -- the state machine ------------------------------------------------------------------------------------------------


@dataclass
class Owner:
    """A running sequence, and the tokens that its state has read."""

    slot: int
    token_ids: list[int]
    table: BlockTable = field(default_factory=table_of)


class StateMachine(RuleBasedStateMachine):
    """Sequences start from what is found, run, fork, save and end; every snapshot holds what its name says."""

    @initialize(num_owners=st.integers(1, 4), more=st.integers(0, 5))
    def start(self, num_owners: int, more: int) -> None:
        self.pool = StatePool(num_owners + more, num_owners)
        self.num_owners = num_owners
        self.memory: list[tuple[int, ...] | None] = [None] * (num_owners + more)
        """The tokens that each slot's state has read, once the copies ordered so far are made."""
        self.done = 0
        """Copies that `memory` shows."""
        self.owners: list[Owner] = []
        self.names: dict[bytes, tuple[int, ...]] = {}
        self.pinned: list[bytes] = []

    def make_copies(self) -> None:
        for source, destination in self.pool.copies[self.done :]:
            self.memory[destination] = () if source == ZERO_STATE else self.memory[source]
        self.done = len(self.pool.copies)

    def note(self, token_ids: list[int]) -> None:
        self.names[table_of().prefix_hash(token_ids, len(token_ids))] = tuple(token_ids)

    @precondition(lambda self: len(self.owners) < self.num_owners)
    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=14), data=st.data())
    def begin(self, token_ids: list[int], data: st.DataObject) -> None:
        limit = data.draw(st.integers(0, len(token_ids)))
        found = self.pool.find(table_of(), token_ids, limit)
        held = {self.names[name] for name, _ in self.pool.snapshots()}
        beginnings = [length for length in range(1, limit + 1) if tuple(token_ids[:length]) in held]
        assert (0 if found is None else found.num_tokens) == max(beginnings, default=0)
        slot = self.pool.take(ZERO_STATE if found is None else found.slot)
        self.owners.append(Owner(slot, token_ids[: 0 if found is None else found.num_tokens]))
        self.make_copies()

    @precondition(lambda self: 0 < len(self.owners) < self.num_owners)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(self.owners))
        self.owners.append(Owner(self.pool.take(parent.slot), parent.token_ids.copy()))
        self.make_copies()

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), new=st.lists(st.integers(0, 1), min_size=1, max_size=6), kept=st.booleans())
    def step(self, data: st.DataObject, new: list[int], kept: bool) -> None:
        """One sequence computes, and may save its state on the way."""
        owner = data.draw(st.sampled_from(self.owners))
        self.pool.take_copies()
        self.done = 0
        slot, end = self.pool.hold(), len(owner.token_ids) + data.draw(st.integers(1, len(new)))
        owner.token_ids += new
        self.memory[owner.slot] = tuple(owner.token_ids)
        if slot is not None:
            self.memory[slot] = tuple(owner.token_ids[:end])
            if kept:
                self.pool.keep_held(slot, table_of(), owner.token_ids, end)
                self.note(owner.token_ids[:end])
            else:
                self.pool.drop(slot)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), kept=st.booleans())
    def end(self, data: st.DataObject, kept: bool) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        self.owners.remove(owner)
        if kept and owner.token_ids:
            self.pool.keep(owner.slot, table_of(), owner.token_ids, len(owner.token_ids))
            self.note(owner.token_ids)
        else:
            self.pool.give(owner.slot)

    @precondition(lambda self: len(self.pinned) < self.pool.max_snapshots and list(self.pool.snapshots()))
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name, _ in self.pool.snapshots()]))
        self.pool.pin(name)
        self.pinned.append(name)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.pinned))
        self.pool.unpin(name)
        self.pinned.remove(name)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        assert {name for name, _ in self.pool.snapshots()} == set(self.pinned)

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def forget(self, token_ids: list[int]) -> None:
        table, num_full = table_of(), len(token_ids) // SIZE
        self.pool.forget([table.prefix_hash(token_ids, number * SIZE) for number in range(num_full + 1)])
        left = {self.names[name] for name, _ in self.pool.snapshots() if name not in self.pinned}
        assert not any(tuple(token_ids[:length]) in left for length in range(1, len(token_ids) + 1))

    @invariant()
    def every_slot_is_accounted_for(self) -> None:
        if not hasattr(self, "pool"):
            return
        snapshots = dict(self.pool.snapshots())
        slots = [*(owner.slot for owner in self.owners), *(each.slot for each in snapshots.values()), *self.pool._free]
        assert sorted(slots) == list(range(len(self.memory)))
        report = self.pool.report()
        assert (report.num_running, report.num_snapshots) == (len(self.owners), len(snapshots))
        assert set(self.pinned) <= snapshots.keys()
        for name, each in snapshots.items():
            assert self.memory[each.slot] == self.names[name]
        for owner in self.owners:
            assert self.memory[owner.slot] == tuple(owner.token_ids)


TestStateMachine = StateMachine.TestCase
TestStateMachine.settings = settings(max_examples=40, stateful_step_count=40)
