"""Block tables by example, then by a state machine that compares pool and tables with a plain model at every step."""

import gc
import random
import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.kv_cache.block_hash import root_hash
from quire.kv_cache.block_pool import BlockPool, OutOfBlocksError
from quire.kv_cache.block_table import BlockCopies, BlockTable
from quire.kv_cache.partial_block_index import MAX_CHILDREN

# -- examples ---------------------------------------------------------------------------------------------------------


def new_table(pool: BlockPool, num_tokens: int = 0, salt: str = "") -> BlockTable:
    table = BlockTable(pool, root_hash(salt, pool.block_size))
    if num_tokens:
        table.append(num_tokens, [])
    return table


def named_table(pool: BlockPool, token_ids: list[int]) -> BlockTable:
    table = new_table(pool, len(token_ids))
    table.hash_full_blocks(token_ids, len(token_ids))
    return table


def test_blocks_are_taken_as_tokens_come() -> None:
    pool = BlockPool(4, 2)
    table = new_table(pool)
    changed = [table.append(1, []) for _ in range(5)]
    assert changed == [0, 1, 1, 2, 2]
    assert (table.blocks, table.num_tokens) == ([0, 1, 2], 5)
    assert (pool.num_filled_slots, pool.num_wasted_slots) == (5, 1)


def test_one_append_can_fill_a_block_and_take_several() -> None:
    pool = BlockPool(4, 4)
    table = new_table(pool, 3)
    assert table.append(10, []) == 1
    assert (table.blocks, pool.fill) == ([0, 1, 2, 3], [4, 4, 4, 1])


def test_exactly_full() -> None:
    pool = BlockPool(2, 4)
    table = new_table(pool, 8)
    assert (table.num_appendable(), pool.num_free, pool.num_wasted_slots) == (0, 0, 0)
    with pytest.raises(OutOfBlocksError, match="1 blocks are needed and 0 are free"):
        table.append(1, [])


def test_one_block_of_one_token() -> None:
    pool = BlockPool(1, 1)
    table = new_table(pool, 1)
    table.hash_full_blocks([7], 1)
    table.free()
    assert table.find_prefix([7])[0] == [], "the last token is always computed"
    assert table.find_prefix([7, 8])[0] == [0]
    table.adopt([[0]])
    assert (table.num_tokens, table.num_appendable(), pool.num_free) == (1, 0, 0)


def test_an_empty_pool_takes_no_token() -> None:
    table = new_table(BlockPool(0, 16))
    assert table.num_appendable() == 0
    with pytest.raises(OutOfBlocksError):
        table.append(1, [])


def test_a_refused_append_changes_nothing() -> None:
    pool = BlockPool(3, 4)
    table = new_table(pool, 6)
    child = table.fork()
    copies: BlockCopies = []
    with pytest.raises(OutOfBlocksError, match="2 blocks are needed and 1 are free"):
        child.append(3, copies)
    assert (copies, child.blocks, child.num_tokens, pool.num_free) == ([], table.blocks, 6, 1)
    assert child.num_appendable() == 2
    child.append(2, copies)
    assert copies == [(1, 2)]


def test_the_first_writer_copies_a_shared_block_and_the_last_holder_writes_in_place() -> None:
    pool = BlockPool(8, 4)
    table = new_table(pool, 6)
    children = [table.fork() for _ in range(2)]
    assert (pool.num_used, pool.num_shared_slots) == (2, 16)
    copies: BlockCopies = []
    assert [each.append(1, copies) for each in (table, *children)] == [1, 1, 2]
    assert copies == [(1, 2), (1, 3)]
    assert [each.blocks for each in (table, *children)] == [[0, 2], [0, 3], [0, 1]]
    assert (pool.total_block_copies, pool.num_filled_slots) == (2, 4 + 3 * 3)


def test_a_full_shared_block_is_not_copied() -> None:
    pool = BlockPool(4, 4)
    table = new_table(pool, 4)
    child = table.fork()
    copies: BlockCopies = []
    assert child.append(1, copies) == 1
    assert (copies, child.blocks) == ([], [0, 1])


def test_a_fork_at_a_partial_position_copies_before_it_writes() -> None:
    pool = BlockPool(8, 4)
    table = new_table(pool, 10)
    child = table.fork(6)
    assert (child.blocks, child.num_tokens) == ([0, 1], 6)
    copies: BlockCopies = []
    child.append(3, copies)
    assert (copies, child.blocks) == ([(1, 3)], [0, 3, 4])
    assert [pool.fill[block] for block in (0, 1, 2, 3, 4)] == [4, 4, 2, 4, 1]


def test_a_fork_of_nothing_holds_nothing() -> None:
    pool = BlockPool(2, 4)
    child = new_table(pool, 3).fork(0)
    assert (child.blocks, child.num_tokens, pool.num_references) == ([], 0, 1)


def test_a_named_block_is_copied_even_by_its_only_holder() -> None:
    pool = BlockPool(4, 4)
    table = named_table(pool, [1, 2, 3, 4])
    child = table.fork(3)
    table.free()
    copies: BlockCopies = []
    assert child.append(1, copies) == 0
    assert (copies, child.blocks) == ([(0, 1)], [1])
    assert pool.num_free == 2, "the source is held until the copy is made"
    pool.copies_are_done()
    assert new_table(pool).find_prefix([1, 2, 3, 4, 5])[0] == [0], "the content that has the name is still there"
    assert (pool.num_cached_free, pool.num_used) == (1, 1)


def test_a_copy_of_a_named_block_needs_a_free_block() -> None:
    pool = BlockPool(1, 4)
    table = named_table(pool, [1, 2, 3, 4])
    child = table.fork(3)
    table.free()
    assert child.num_appendable() == 0
    with pytest.raises(OutOfBlocksError):
        child.append(1, [])


def test_freed_blocks_are_found_again_beginnings_longest() -> None:
    pool = BlockPool(3, 2)
    token_ids = [1, 2, 3, 4, 5, 6]
    named_table(pool, token_ids).free()
    other = new_table(pool)
    assert other.find_prefix([*token_ids, 7])[0] == [0, 1, 2]
    assert other.find_prefix(token_ids)[0] == [0, 1], "the last token is always computed"
    new_table(pool, 1)
    assert new_table(pool).find_prefix([*token_ids, 7])[0] == [0, 1], "the end of the prompt is evicted first"


def test_a_table_goes_on_from_what_it_adopts() -> None:
    pool = BlockPool(4, 2)
    token_ids = [1, 2, 3, 4, 5, 6]
    named_table(pool, token_ids[:2]).free()
    table = new_table(pool)
    table.adopt([table.find_prefix(token_ids)[0]])
    table.append(4, [])
    table.hash_full_blocks(token_ids, 6)
    table.free()
    assert table.num_tokens == 0
    found = table.find_prefix([*token_ids, 7])[0]
    child = new_table(pool)
    child.adopt([found[:1]])
    child.adopt([found[1:]])
    assert (child.num_tokens, len(child.blocks), pool.num_filled_slots) == (6, 3, 6)


def test_other_salts_find_nothing() -> None:
    pool = BlockPool(2, 2)
    table = new_table(pool, 2, salt="one")
    table.hash_full_blocks([1, 2], 2)
    assert new_table(pool, salt="two").find_prefix([1, 2, 3])[0] == []
    assert new_table(pool, salt="one").find_prefix([1, 2, 3])[0] == table.blocks


def test_twins_keep_their_own_blocks() -> None:
    pool = BlockPool(4, 2)
    first, second = named_table(pool, [1, 2, 3, 4]), named_table(pool, [1, 2, 3, 4])
    assert new_table(pool).find_prefix([1, 2, 3, 4, 5])[0] == first.blocks
    first.free()
    assert (pool.num_cached_free, second.blocks) == (2, [2, 3])
    second.free()
    assert list(pool.free_order()) == [2, 3, 1, 0]


def test_a_fork_names_the_blocks_it_fills_itself() -> None:
    pool = BlockPool(8, 2)
    table = named_table(pool, [1, 2, 3, 4, 5, 6])
    child = table.fork(2)
    child.append(2, [])
    child.hash_full_blocks([1, 2, 7, 8], 4)
    assert new_table(pool).find_prefix([1, 2, 7, 8, 9])[0] == child.blocks
    assert new_table(pool).find_prefix([1, 2, 3, 4, 5, 6, 7])[0] == table.blocks


def test_forgotten_names_of_a_table() -> None:
    pool = BlockPool(4, 2)
    table = named_table(pool, [1, 2, 3, 4])
    child = table.fork(2)
    child.append(1, [])
    child.remove_hashes()
    assert new_table(pool).find_prefix([1, 2, 3, 4, 5])[0] == []
    table.hash_full_blocks([1, 2, 3, 4, 5, 6], 4)
    assert pool.hashes[table.blocks[0]] is None, "a block is named once"


def test_without_prefix_caching_nothing_is_found_or_hashed() -> None:
    pool = BlockPool(2, 2, enable_prefix_caching=False)
    table = named_table(pool, [1, 2])
    assert (table.find_prefix([1, 2, 3])[0], pool.hashes) == ([], [None, None])


def test_a_million_operations_leave_no_trace() -> None:
    """Memory is flat: as many live Python objects after a million operations as after the first ten thousand."""
    rng = random.Random(1)
    pool = BlockPool(256, 4)
    tables: list[tuple[BlockTable, list[int]]] = []
    done = 0
    started_with = 0
    while done < 1_000_000:
        if not started_with and done > 10_000:
            for table, _ in tables:
                table.free()
            tables.clear()
            pool.clear_hashes()
            gc.collect()
            started_with = sys.getallocatedblocks()
        draw = rng.random()
        pool.copies_are_done()
        if len(tables) < 12:
            token_ids = [rng.randrange(2) for _ in range(rng.randrange(1, 16))]
            table = new_table(pool)
            table.adopt([table.find_prefix(token_ids)[0]])
            num_new = len(token_ids) - table.num_tokens
            if num_new <= table.num_appendable():
                table.append(num_new, [])
                table.hash_full_blocks(token_ids, len(token_ids))
                tables.append((table, token_ids))
            else:
                table.free()
                tables.pop(rng.randrange(len(tables)))[0].free()
            done += 3
        elif draw < 0.02:
            tables.pop(rng.randrange(len(tables)))[0].free()
            done += 1
        elif draw < 0.04 and len(tables) < 16:
            table, token_ids = rng.choice(tables)
            length = rng.randrange(1, table.num_tokens + 1)
            tables.append((table.fork(length), token_ids[:length]))
            done += 1
        else:
            table, token_ids = tables[int(draw * len(tables))]
            if table.num_appendable():
                table.append(1, [])
                token_ids.append(1)
                if len(token_ids) % 4 == 0:
                    table.hash_full_blocks(token_ids, len(token_ids))
            else:
                table.free()
                tables.remove((table, token_ids))
            done += 1
    for table, _ in tables:
        table.free()
    tables.clear()
    pool.copies_are_done()
    assert (pool.num_free, pool.num_references, pool.num_filled_slots) == (256, 0, 0)
    pool.clear_hashes()
    gc.collect()
    assert sys.getallocatedblocks() - started_with < 2_000


def test_a_prefix_that_ends_inside_a_block_goes_on_from_there() -> None:
    pool = BlockPool(8, 4)
    table = named_table(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    other = new_table(pool)
    wanted = [1, 2, 3, 4, 5, 6, 9, 9, 9]
    found = other.find_prefix(wanted)[0]
    inside = other.match_partial(wanted, len(found))
    assert (found, inside) == ([0], ([1], 2))
    other.adopt([found], inside)
    assert (other.blocks, other.num_tokens, other.num_copies_to_come) == ([0, 1], 6, 1)
    copies: BlockCopies = []
    assert other.append(3, copies) == 1
    assert (copies, other.blocks) == ([(1, 2)], [0, 2, 3])
    other.hash_full_blocks(wanted, 9)
    assert new_table(pool).find_prefix([*wanted, 9])[0] == [0, 2], "the copy has its own name"
    assert new_table(pool).find_prefix([1, 2, 3, 4, 5, 6, 7, 8, 9])[0] == table.blocks, "and the source keeps its own"


def test_no_block_is_copied_from_and_to_in_one_step() -> None:
    """The first source is free as soon as its copy is ordered, and would be the next block to be taken."""
    pool = BlockPool(3, 4)
    sources = [named_table(pool, [token, 1, 2, 3]) for token in (7, 8)]
    tables = [new_table(pool) for _ in sources]
    for table, source, token in zip(tables, sources, (7, 8), strict=True):
        table.adopt([[]], table.match_partial([token, 1, 9], 0))
        source.free()
    copies: BlockCopies = []
    tables[0].append(1, copies)
    with pytest.raises(OutOfBlocksError):
        tables[1].append(1, copies)
    pool.copies_are_done()
    tables[1].append(1, copies)
    assert copies == [(0, 2), (1, 0)]


def test_the_last_token_and_other_salts_are_never_found_inside_a_block() -> None:
    pool = BlockPool(4, 4)
    named_table(pool, [1, 2, 3, 4])
    for wanted, inside in (([1], None), ([1, 2], ([0], 1)), ([1, 2, 3, 4], ([0], 3)), ([2, 1, 1], None)):
        assert new_table(pool).match_partial(wanted, 0) == inside
    assert new_table(pool, salt="other").match_partial([1, 2, 3], 0) is None


def test_of_many_that_part_the_latest_are_remembered() -> None:
    pool = BlockPool(MAX_CHILDREN + 2, 2)
    for token in range(MAX_CHILDREN + 2):
        named_table(pool, [7 + (token == 0), token]).free()
    assert new_table(pool).match_partial([7, 99], 0) == ([MAX_CHILDREN + 1], 1), "the latest of equals"
    assert new_table(pool).match_partial([8, 99], 0) is None, "the oldest is forgotten"
    assert new_table(pool).find_prefix([8, 0, 1])[0] == [0], "but still found by its name"
    assert len(pool.children) == MAX_CHILDREN
    pool.clear_hashes()
    assert len(pool.children) == 0


def test_a_block_left_partly_filled_is_gone_on_in() -> None:
    pool = BlockPool(8, 4)
    token_ids = [1, 2, 3, 4, 5, 6, 7]
    named_table(pool, token_ids).free(token_ids)
    assert list(pool.free_order()) == [2, 3, 4, 5, 6, 7, 1, 0], "what can be found is taken last"
    table = new_table(pool)
    wanted = [1, 2, 3, 4, 5, 6, 9, 9, 9]
    found = table.find_prefix(wanted)[0]
    inside = table.match_partial(wanted, len(found))
    assert (found, inside) == ([0], ([1], 2))
    table.adopt([found], inside)
    assert (table.num_tokens, table.num_copies_to_come, pool.fill[1], pool.num_filled_slots) == (6, 0, 2, 6)
    other = new_table(pool)
    assert (other.find_prefix(wanted)[0], other.match_partial(wanted, 1)) == ([0], None), "it is its finder's alone"
    copies: BlockCopies = []
    assert table.append(3, copies) == 2
    assert (copies, table.blocks, pool.num_free) == ([], [0, 1, 2], 5)


def test_what_is_left_is_what_is_stored() -> None:
    pool = BlockPool(8, 4)
    token_ids = [1, 2, 3, 4, 5, 6, 7]
    table = named_table(pool, token_ids)
    table.append(5, [])  # planned, and not computed
    table.free(token_ids)
    child = new_table(pool)
    assert (child.find_prefix([*token_ids, 8])[0], child.match_partial([*token_ids, 8], 1)) == ([0], ([1], 3))
    child.adopt([[0]], ([1], 3))
    fork = child.fork()
    child.append(1, [])  # a copy is ordered
    child.free(token_ids)
    assert len(pool.children) == 1, "what may not have been copied is not left"
    fork.free(token_ids)
    assert len(pool.children) == 2
    twin = new_table(pool)
    twin.adopt([[0]])
    twin.append(2, [])
    twin.free(token_ids[:6])
    assert len(pool.children) == 2, "nor what can be found elsewhere"


# -- the state machine ------------------------------------------------------------------------------------------------

NO_TOKEN = -1


@dataclass
class ModelTable:
    """A sequence as the model knows it: its tokens, and where each block should be."""

    table: BlockTable
    salt: str
    token_ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_named: int = 0
    """Blocks that had their turn to be named; each has one."""
    copied_at: int = -1
    """How many tokens it had when its last block was copied last."""


class PoolMachine(RuleBasedStateMachine):
    """Drives tables at random; the model keeps lists and dictionaries, and the tokens that stand in every slot."""

    @initialize(num_blocks=st.integers(1, 64), block_size=st.integers(1, 32), caching=st.booleans())
    def start(self, num_blocks: int, block_size: int, caching: bool) -> None:
        self.size = block_size
        self.pool = BlockPool(num_blocks, block_size, enable_prefix_caching=caching)
        self.caching = caching
        self.tables: list[ModelTable] = []
        self.memory = [[NO_TOKEN] * block_size for _ in range(num_blocks)]
        self.free = list(range(num_blocks))
        self.refs = [0] * num_blocks
        self.fill = [0] * num_blocks
        self.named: dict[tuple[str, tuple[int, ...]], int] = {}
        """Salt and all tokens up to the block's end → block."""
        self.children: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        """Salt and all tokens before the block → the latest blocks there that are named or left."""
        self.left: dict[int, tuple[str, tuple[int, ...]]] = {}
        """Free blocks that were left partly filled → salt and all tokens up to where they are filled."""
        self.pinned: list[ModelTable] = []
        """Registered prefixes: tables of no sequence."""
        self.num_evictions = self.num_copies = 0

    # What the pool should do, written with lists.

    def content_of(self, block: int) -> tuple[str, tuple[int, ...]] | None:
        return next((content for content, named in self.named.items() if named == block), None)

    def take(self) -> int:
        block = self.free.pop(0)
        content = self.content_of(block)
        if content is not None:
            self.forget(content)
            self.num_evictions += 1
        if block in self.left:
            self.forget_left(block)
        self.refs[block], self.fill[block] = 1, 0
        return block

    def siblings(self, salt: str, before: tuple[int, ...]) -> list[int]:
        return self.children.setdefault((salt, before), [])

    def remember(self, block: int, salt: str, before: tuple[int, ...]) -> None:
        siblings = self.siblings(salt, before)
        siblings.append(block)
        for oldest in siblings[:-MAX_CHILDREN]:
            siblings.remove(oldest)
            if self.left.pop(oldest, None):
                self.free.remove(oldest)
                self.free.insert(0, oldest)

    def forget_left(self, block: int) -> None:
        salt, token_ids = self.left.pop(block)
        self.siblings(salt, token_ids[: len(token_ids) // self.size * self.size]).remove(block)

    def tokens_of(self, block: int) -> list[int]:
        """What a named or left block holds for whoever finds it."""
        if block in self.left:
            return self.memory[block][: len(self.left[block][1]) % self.size]
        return self.memory[block]

    def forget(self, content: tuple[str, tuple[int, ...]]) -> None:
        block = self.named.pop(content)
        siblings = self.children[content[0], content[1][: -self.size]]
        if block in siblings:
            siblings.remove(block)

    def is_pinned(self, block: int) -> bool:
        return any(block in prefix.blocks for prefix in self.pinned)

    def shared_inside(self, salt: str, token_ids: list[int], num_found: int) -> dict[int, int]:
        """Block → how many of the tokens after `num_found` blocks it begins with, the last token left out."""
        start = num_found * self.size
        wanted = token_ids[start : min(start + self.size, len(token_ids)) - 1]
        lengths = {}
        for block in self.children.get((salt, tuple(token_ids[:start])), ()):
            equal = [a == b for a, b in zip(wanted, self.tokens_of(block), strict=False)]
            lengths[block] = equal.index(False) if False in equal else len(equal)
        return {block: length for block, length in lengths.items() if length}

    def share(self, block: int) -> None:
        if self.refs[block] == 0:
            self.free.remove(block)
            if block in self.left:
                self.forget_left(block)
        self.refs[block] += 1

    def release(self, block: int) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0:
            is_found = self.content_of(block) is not None or block in self.left
            self.free.insert(len(self.free) if is_found else 0, block)

    def cached_prefix(self, salt: str, token_ids: list[int]) -> list[int]:
        found: list[int] = []
        for end in range(self.size, len(token_ids), self.size):
            block = self.named.get((salt, tuple(token_ids[:end])))
            if block is None:
                break
            found.append(block)
        return found

    def write(self, each: ModelTable, new_tokens: list[int]) -> None:
        """Append through the table, then do to the memory what a runner would, and compare."""
        used, start = len(each.token_ids) % self.size, len(each.token_ids)
        needs_copy = used > 0 and (self.refs[each.blocks[-1]] > 1 or self.content_of(each.blocks[-1]) is not None)
        num_missing = -(-(start + len(new_tokens)) // self.size) - len(each.blocks)
        room = (self.size - used if used else 0) + (len(self.free) - needs_copy) * self.size
        if needs_copy and not self.free:
            room = 0
        assert each.table.num_appendable() == room
        copies: BlockCopies = []
        if len(new_tokens) > room:
            with pytest.raises(OutOfBlocksError):
                each.table.append(len(new_tokens), copies)
            assert copies == []
            return
        first_changed = len(each.blocks) - needs_copy
        changed = each.table.append(len(new_tokens), copies)
        assert changed == first_changed
        if needs_copy:
            source, each.blocks[-1] = each.blocks[-1], self.take()
            assert copies == [(source, each.blocks[-1])]
            each.copied_at = start
            self.num_copies += 1
        each.blocks += [self.take() for _ in range(num_missing)]
        for source, destination in copies:
            self.memory[destination] = self.memory[source].copy()
            self.release(source)
        self.pool.copies_are_done()
        each.token_ids += new_tokens
        for position in range(start, len(each.token_ids)):
            block, offset = each.table.blocks[position // self.size], position % self.size
            assert self.refs[block] == 1, "a shared block is written"
            assert self.content_of(block) is None, "a named block is written"
            self.memory[block][offset] = each.token_ids[position]
            self.fill[block] = offset + 1

    def name(self, each: ModelTable, num_computed: int) -> None:
        each.table.hash_full_blocks(each.token_ids, num_computed)
        if self.caching:
            for index in range(each.num_named, num_computed // self.size):
                content = each.salt, tuple(each.token_ids[: (index + 1) * self.size])
                if self.content_of(each.blocks[index]) is None and content not in self.named:
                    self.named[content] = each.blocks[index]
                    self.remember(each.blocks[index], each.salt, content[1][: -self.size])
            each.num_named = max(each.num_named, num_computed // self.size)

    def begin(self, salt: str, token_ids: list[int]) -> None:
        """What the scheduler does with a new or resumed sequence: adopt what is cached, compute the rest, name it."""
        each = ModelTable(BlockTable(self.pool, root_hash(salt, self.size)), salt)
        found = each.table.find_prefix(token_ids)[0]
        assert found == self.cached_prefix(salt, token_ids)
        inside = each.table.match_partial(token_ids, len(found))
        lengths = self.shared_inside(salt, token_ids, len(found)) if self.caching else {}
        assert (inside is None) == (not lengths)
        if inside is not None:
            assert inside[1] == lengths[inside[0][0]] == max(lengths.values())
        each.table.adopt([found], inside)
        each.blocks = [*found, *(inside[0] if inside else [])]
        for block in each.blocks:
            taken_over = block in self.left
            self.share(block)
            if taken_over and inside is not None:
                self.fill[block] = inside[1]
        each.num_named = len(found)
        each.token_ids = token_ids[: len(found) * self.size + (inside[1] if inside else 0)]
        self.tables.append(each)
        if len(token_ids) > len(each.token_ids):
            self.write(each, token_ids[len(each.token_ids) :])
        self.name(each, len(each.token_ids))

    def end(self, each: ModelTable, num_stored: int = 0) -> None:
        stored = each.token_ids[:num_stored]
        each.table.free(stored)
        full = num_stored // self.size
        if self.caching and num_stored % self.size and num_stored > each.copied_at:
            block, before, rest = each.blocks[full], tuple(stored[: full * self.size]), stored[full * self.size :]
            others = self.children.get((each.salt, before), ())
            is_known = any(self.tokens_of(other)[: len(rest)] == rest for other in others)
            if self.refs[block] == 1 and self.content_of(block) is None and not is_known:
                self.left[block] = each.salt, tuple(stored)
                self.remember(block, each.salt, before)
        for block in reversed(each.blocks):
            self.release(block)
        self.tables.remove(each)

    # What happens to it. Few different tokens, so that prefixes are often equal.

    @rule(salt=st.sampled_from("ab"), token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=80))
    def begin_new(self, salt: str, token_ids: list[int]) -> None:
        self.begin(salt, token_ids)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=40))
    def begin_with_a_known_prefix(self, data: st.DataObject, more: list[int]) -> None:
        each = data.draw(st.sampled_from(self.tables))
        length = data.draw(st.integers(0, len(each.token_ids)))
        if length or more:
            self.begin(each.salt, each.token_ids[:length] + more)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), new_tokens=st.lists(st.integers(0, 1), min_size=1, max_size=40), name=st.booleans())
    def append(self, data: st.DataObject, new_tokens: list[int], name: bool) -> None:
        each = data.draw(st.sampled_from(self.tables))
        self.write(each, new_tokens)
        if name:
            self.name(each, data.draw(st.integers(0, len(each.token_ids))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), drafted=st.lists(st.integers(0, 1), min_size=1, max_size=40))
    def append_and_take_back(self, data: st.DataObject, drafted: list[int]) -> None:
        """As drafted tokens are, of which only the first hold."""
        each = data.draw(st.sampled_from(self.tables))
        start = len(each.token_ids)
        self.write(each, drafted)
        if len(each.token_ids) > start:
            end = data.draw(st.integers(start, len(each.token_ids)))
            each.table.truncate(end)
            for block in reversed(each.blocks[-(-end // self.size) :]):
                self.release(block)
            del each.blocks[-(-end // self.size) :], each.token_ids[end:]
            if end % self.size:
                self.fill[each.blocks[-1]] = end % self.size

    @precondition(lambda self: self.tables)
    @rule(token=st.integers(0, 1))
    def append_one_to_all(self, token: int) -> None:
        for each in self.tables:
            self.write(each, [token])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.tables))
        length = data.draw(st.none() | st.integers(0, len(each.token_ids)))
        table = each.table.fork(length)
        token_ids = each.token_ids[:length]
        child = ModelTable(table, each.salt, token_ids, each.blocks[: -(-len(token_ids) // self.size)])
        child.num_named = min(each.num_named, len(token_ids) // self.size)
        for block in child.blocks:
            self.share(block)
        self.tables.append(child)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free_one(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.tables))
        self.end(each, len(each.token_ids) - data.draw(st.integers(0, min(3, len(each.token_ids)))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free_one_that_leaves_nothing(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.tables)))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def preempt_and_resume(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.tables))
        self.end(each, len(each.token_ids))
        if each.token_ids:
            self.begin(each.salt, each.token_ids)

    @rule()
    def forget_all_names(self) -> None:
        self.pool.clear_hashes()
        held = {*self.named.values(), *self.left}
        self.free.sort(key=lambda block: block not in held)  # stable: what is forgotten comes first, in its order
        for content in [content for content, block in self.named.items() if not self.is_pinned(block)]:
            self.forget(content)
        for block in list(self.left):
            self.forget_left(block)

    @precondition(lambda self: self.tables and self.caching)
    @rule(data=st.data())
    def pin_a_prefix(self, data: st.DataObject) -> None:
        """What registering does: a table of no sequence takes up what is named, and pins it."""
        each = data.draw(st.sampled_from(self.tables))
        prefix = ModelTable(new_table(self.pool, salt=each.salt), each.salt)
        prefix.blocks = prefix.table.find_prefix([*each.token_ids, 0])[0]
        prefix.table.adopt([prefix.blocks])
        self.pool.pin(prefix.blocks)
        for block in prefix.blocks:
            self.share(block)
        prefix.token_ids = each.token_ids[: len(prefix.blocks) * self.size]
        self.pinned.append(prefix)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin_a_prefix(self, data: st.DataObject) -> None:
        self.unpin(data.draw(st.sampled_from(self.pinned)))

    def unpin(self, prefix: ModelTable) -> None:
        self.pool.unpin(prefix.blocks)
        prefix.table.free()
        for block in reversed(prefix.blocks):
            self.release(block)
        self.pinned.remove(prefix)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def forget_names_of_one(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.tables))
        each.table.remove_hashes()
        for content in [content for content, block in self.named.items() if block in each.blocks]:
            if not self.is_pinned(self.named[content]):
                self.forget(content)

    # What must hold.

    @invariant()
    def every_table_reads_back_its_tokens(self) -> None:
        for each in (*self.tables, *self.pinned):
            assert each.table.blocks == each.blocks
            assert each.table.num_tokens == len(each.token_ids)
            read = [token for block in each.blocks for token in self.memory[block]]
            assert read[: len(each.token_ids)] == each.token_ids
            assert 0 <= len(each.blocks) * self.size - len(each.token_ids) < self.size, "waste is below a block"

    @invariant()
    def every_block_is_free_or_used(self) -> None:
        pool = self.pool
        assert list(pool.free_order()) == self.free
        assert pool.ref_counts == self.refs
        assert pool.num_free == len(self.free)
        assert {block for block, count in enumerate(self.refs) if count} == set(range(pool.num_blocks)) - set(self.free)
        holders = (*self.tables, *self.pinned)
        assert pool.num_references == sum(self.refs) == sum(len(each.blocks) for each in holders)
        pinned = {block for prefix in self.pinned for block in prefix.blocks}
        assert set(pool.pinned) == pinned
        assert pinned <= set(self.named.values()), "what is pinned can be found"
        if not self.tables:
            assert pool.num_free == pool.num_blocks - len(pinned)

    @invariant()
    def names_mean_content(self) -> None:
        pool = self.pool
        assert {block for block, name in enumerate(pool.hashes) if name is not None} == set(self.named.values())
        assert len(set(self.named.values())) == len(self.named)
        for (_, token_ids), block in self.named.items():
            assert pool.find(pool.hashes[block] or b"") == block
            assert self.memory[block] == list(token_ids[-self.size :])
        assert pool.num_cached_free == sum(pool.hashes[block] is not None for block in self.free)
        found = [pool.hashes[block] is not None or block in pool.children for block in self.free]
        assert found == sorted(found), "blocks that cannot be found are taken first"
        for block, (_, token_ids) in self.left.items():
            used = len(token_ids) % self.size
            assert (self.refs[block], self.memory[block][:used]) == (0, list(token_ids[-used:]))
        remembered = {block for siblings in self.children.values() for block in siblings}
        assert remembered == {block for block in range(pool.num_blocks) if block in pool.children}
        assert len(pool.children) == len(remembered)
        assert remembered <= {*self.named.values(), *self.left}
        assert remembered >= self.left.keys(), "in the index: free or named"

    @invariant()
    def counters_are_exact(self) -> None:
        pool = self.pool
        used = [block for block, count in enumerate(self.refs) if count]
        assert pool.num_used == len(used)
        assert pool.num_filled_slots == sum(self.fill[block] for block in used)
        assert pool.num_allocated_slots == len(used) * self.size
        assert pool.num_wasted_slots == sum(self.size - self.fill[block] for block in used)
        assert pool.num_shared_slots == sum(count - 1 for count in self.refs if count) * self.size
        assert (pool.total_evictions, pool.total_block_copies) == (self.num_evictions, self.num_copies)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for each in list(self.tables):
                self.end(each)
            for prefix in list(self.pinned):
                self.unpin(prefix)
            assert self.pool.num_free == self.pool.num_blocks
            assert self.pool.num_references == self.pool.num_filled_slots == 0


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=120, stateful_step_count=40)
