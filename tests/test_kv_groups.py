"""KVLayout: which layers form a group, and how many blocks a sequence needs."""

import pytest

from quire.errors import ConfigError
from quire.kv_groups import KVLayout, describe_groups, first_kept_block, most_blocks
from quire.layer_spec import KVSpec


def row(window: int = 0, num_heads: int = 2) -> KVSpec:
    kind = "window" if window else "full"
    return KVSpec(kind=kind, num_heads=num_heads, key_dim=8, value_dim=8, window=window)  # type: ignore[arg-type]


def layout(windows: list[int]) -> KVLayout:
    return KVLayout.of_layers([row(window) for window in windows])


@pytest.mark.parametrize(
    ("windows", "layers_per_block", "groups"),
    [
        ([0] * 32, 32, [0]),  # Llama
        ([4096] * 32, 32, [4096]),  # Mistral
        ([4096, 0] * 13, 13, [0, 4096]),  # Gemma 2
        (([512] * 5 + [0]) * 4 + [512] * 2, 4, [0] + 6 * [512]),  # Gemma 3 1B
        (([1024] * 5 + [0]) * 10 + [1024] * 2, 10, [0] + 6 * [1024]),  # Gemma 3 27B
        ([128, 0] * 12, 12, [0, 128]),  # gpt-oss
        (([4096] * 3 + [0]) * 8, 8, [0] + 3 * [4096]),  # Cohere 2
        ([0, 16, 64, 16], 1, [0, 64, 16, 16]),
        ([0], 1, [0]),
    ],
)
def test_groups_are_few_and_lose_little(windows: list[int], layers_per_block: int, groups: list[int]) -> None:
    found = layout(windows)
    assert found.layers_per_block == layers_per_block
    assert list(found.windows) == groups
    assert sorted(layer for group in found.groups for layer in group.layers) == list(range(len(windows)))
    assert all(windows[layer] == group.window for group in found.groups for layer in group.layers)
    assert found.block_bytes(16, "float16") == layers_per_block * 16 * row().bytes_per_token("float16")


def test_rows_of_two_sizes_are_refused_with_both() -> None:
    with pytest.raises(ConfigError, match=r"2 heads of 8 \+ 8 and 4 heads of 8 \+ 8 elements; supported is one size"):
        KVLayout.of_layers([row(), row(num_heads=4)])


@pytest.mark.parametrize("alignment", [1, 2, 12])
@pytest.mark.parametrize("size", [1, 3, 4, 16])
@pytest.mark.parametrize("window", [0, 1, 2, 3, 4, 5, 16, 17, 40])
def test_what_a_sequence_needs_while_it_grows_by_one_token(window: int, size: int, alignment: int) -> None:
    """At every position it holds the blocks from the first that its window reaches to that of its own token."""
    for longest in (1, 5, 33, 100):
        held = [
            position // size - first_kept_block(position // size * size, window, size, alignment) + 1
            for position in range(longest)
        ]
        assert max(held) <= most_blocks(longest, window, size, alignment)
    if not window:
        assert most_blocks(100, 0, size) == -(-100 // size)
    elif alignment == 1:
        assert max(held) == most_blocks(100, window, size), "the bound is met"
    for position in range(window, 100):
        if window:
            first = first_kept_block(position, window, size, alignment) * size
            assert first <= position - window + 1 < first + size + alignment - 1


def test_the_longest_sequence_that_fits() -> None:
    hybrid = layout([0, 32, 32])
    assert hybrid.longest(3, 1000, 16) == 16
    assert hybrid.longest(2, 1000, 16) == 0
    assert hybrid.longest(6 + 20, 1000, 16) == 320
    assert hybrid.longest(6 + 20, 300, 16) == 300
    assert layout([32]).longest(3, 10**6, 16) == 10**6, "a window needs no more"
    assert [hybrid.most_blocks(n, 16) for n in (1, 16, 17, 48, 49, 320)] == [3, 3, 6, 9, 10, 26]


def test_groups_in_words() -> None:
    assert describe_groups(layout([0, 32, 32]).groups) == "3 groups of up to 1 layers (1 full, 2 window 32)"
    assert describe_groups(layout([32] * 4).groups) == "1 group of up to 4 layers (1 window 32)"
