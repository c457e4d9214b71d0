"""PrefixHistory: each reason in its plainest form, and its bounds."""

from quire.kv_cache.block_hash import hash_block, root_hash
from quire.kv_cache.prefix_history import MAX_CAPACITY, PrefixHistory
from quire.outputs import PrefixMiss

PROMPT = list(range(12))


def hashes(salt: str, count: int = 3) -> list[bytes]:
    parent, found = root_hash(salt, 4), []
    for index in range(count):
        parent = hash_block(parent, PROMPT[4 * index : 4 * index + 4])
        found.append(parent)
    return found


def test_every_reason() -> None:
    now = [10.0]
    history = PrefixHistory(4, lambda: now[0], 64)
    assert history.explain(PROMPT, 0, hashes("")[0]) == PrefixMiss(0, "new", None)
    assert history.explain(PROMPT, 0, hashes("")[0]) == PrefixMiss(0, "new", None), (
        "under the same salt it is just not there"
    )
    assert history.explain(PROMPT, 0, hashes("other")[0]) == PrefixMiss(0, "salt", None)
    assert history.explain(PROMPT, 2, hashes("")[2]) == PrefixMiss(2, "differs", None)
    history.note_eviction(hashes("")[2])
    now[0] = 12.5
    assert history.explain(PROMPT, 2, hashes("")[2]) == PrefixMiss(2, "evicted", 2.5)
    assert history.explain(PROMPT, 2, hashes("")[2]) == PrefixMiss(2, "differs", None), "it was computed again since"


def test_the_oldest_entries_are_removed() -> None:
    history, large = PrefixHistory(4, lambda: 0.0, 1), PrefixHistory(4, lambda: 0.0, 10**6)
    for index in range(3):
        history.note_eviction(hashes("")[index])
    assert [history.explain(PROMPT, index, hashes("")[index]).reason for index in (1, 2)] == ["evicted", "evicted"]
    assert history.explain(PROMPT, 0, hashes("")[0]).reason == "new"
    assert len(history._evicted) == 0
    for salt in "abc":
        history.explain([ord(salt), *PROMPT], 0, hashes(salt)[0])
    assert len(history._beginnings) == 2
    for index in range(MAX_CAPACITY + 9):
        large.note_eviction(index.to_bytes(32, "big"))
    assert len(large._evicted) == MAX_CAPACITY
