"""PrefixIndex against a model that looks at every block, and its bounds."""

from hypothesis import given
from hypothesis import strategies as st

from quire.routing.prefix_index import DEVICE, DISK, HOST, PrefixIndex

PROMPT = list(range(100, 140))


@given(st.dictionaries(st.integers(0, 70), st.integers(0, len(PROMPT)), max_size=20), st.integers(0, len(PROMPT)))
def test_lengths_are_those_of_a_linear_search(held: dict[int, int], num_asked: int) -> None:
    index = PrefixIndex(max_blocks=1000)
    for replica, length in held.items():
        index.add(replica, PROMPT[:length])
    asked = PROMPT[:num_asked]
    wanted = {replica: min(length, num_asked) for replica, length in held.items() if min(length, num_asked)}
    assert index.prefix_lengths(asked) == wanted


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "remove", "clear"]),
            st.integers(0, 3),
            st.integers(0, 30),
            st.sampled_from([0, 1, 2]),
        ),
        max_size=40,
    )
)
def test_entries_are_bounded_and_agree_with_a_plain_set(steps: list[tuple[str, int, int, int]]) -> None:
    index = PrefixIndex(max_blocks=25)
    model: dict[int, list[tuple[int, int]]] = {}
    for what, replica, length, tier in steps:
        entries = model.setdefault(replica, [])
        blocks = PROMPT[:length]
        if what == "clear":
            index.clear(replica)
            entries.clear()
        elif what == "remove":
            index.remove(replica, blocks, tier)
            entries[:] = [entry for entry in entries if not (entry[1] == tier and entry[0] in blocks)]
        else:
            index.add(replica, blocks, tier)
            fresh = [(block, tier) for block in blocks]
            entries[:] = ([entry for entry in entries if entry not in fresh] + fresh)[-25:]
        assert index.num_blocks(replica) == len(entries) <= 25
        for tier_asked in (DEVICE, HOST, DISK):
            for number, kept in model.items():
                holds_first = (PROMPT[0], tier_asked) in kept
                assert (number in index.prefix_lengths(PROMPT[:1], tier_asked)) == holds_first


def test_a_cleared_replica_leaves_nothing_behind() -> None:
    index = PrefixIndex(max_blocks=100)
    index.add(3, PROMPT)
    index.add(3, PROMPT, HOST)
    index.clear(3)
    assert index.prefix_lengths(PROMPT) == {}
    assert not index.has_lower_tiers
    index.remove(3, PROMPT)  # news of a replica that is gone


def test_any_tier_counts() -> None:
    index = PrefixIndex(max_blocks=100)
    index.add(0, PROMPT[:10])
    index.add(0, PROMPT[10:20], DISK)
    assert index.prefix_lengths(PROMPT) == {0: 20}
    assert index.prefix_lengths(PROMPT, DEVICE) == {0: 10}
