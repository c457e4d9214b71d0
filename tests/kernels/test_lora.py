"""Low-rank updates: equal to float64 in every shape and on every device's kernels, and the same in every batch."""

import pytest
import torch
from torch import Tensor

from quire.kernels import cpu, reference, sdpa
from quire.kernels.interface import Kernels
from quire.kernels.lora import LoraRows, LoraWeights

SLOTS, MAX_RANK = 5, 19


@pytest.fixture(params=[*cpu.supported_isas(), "sdpa"])
def kernels(request: pytest.FixtureRequest) -> object:
    if request.param == "sdpa":
        yield sdpa
        return
    before = cpu.isa()
    cpu.use_isa(request.param)
    yield cpu
    cpu.use_isa(before)


def weights(k: int, widths: list[int], ranks: list[list[int]]) -> LoraWeights:
    """Ranks beyond those that count hold numbers that must not matter."""
    generator = torch.Generator().manual_seed(k)
    ends = torch.tensor(widths).cumsum(0)
    a = torch.randn(SLOTS, len(widths), MAX_RANK, k, generator=generator)
    b = torch.randn(SLOTS, MAX_RANK, int(ends[-1]), generator=generator)
    return LoraWeights(a, b, torch.tensor(ranks, dtype=torch.int32), ends.int())


def rows_of(slots: list[int], tile: int) -> LoraRows:
    """The rows of a step whose row i uses slot slots[i]; −1: none."""
    order = sorted((slot, row) for row, slot in enumerate(slots) if slot >= 0)
    groups = []
    for slot in sorted({slot for slot, _ in order}):
        places = [place for place, (other, _) in enumerate(order) if other == slot]
        groups.append((slot, places[0], places[-1] + 1))
    tiles = [(s, first, min(first + tile, end)) for s, begin, end in groups for first in range(begin, end, tile)]
    rows = [row for _, row in order]
    return LoraRows(
        torch.tensor(rows, dtype=torch.int32),
        torch.tensor(tiles, dtype=torch.int32).view(-1, 3),
        groups,
        are_all=rows == list(range(len(slots))),
    )


def updated(kernels: Kernels, out: Tensor, x: Tensor, slots: list[int], lora: LoraWeights) -> Tensor:
    out = out.clone()
    rows = rows_of(slots, kernels.LORA_TILE)
    kernels.add_lora(out, rows.select(x), rows, lora)
    return out


STEPS = {
    "none": [-1] * 3,
    "one": [2],
    "all of one": [3] * 21,
    "some": [-1, 0, -1, 0, 4, -1],
    "mixed": [row % 7 - 1 if row % 7 < 6 else -1 for row in range(45)],
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("k", "widths"), [(1, [1]), (7, [3, 1, 9]), (64, [33]), (300, [70, 16, 16]), (130, [1100, 1100])], ids=str
)
def test_equals_float64(kernels: Kernels, step: str, k: int, widths: list[int]) -> None:
    ranks = [[(4 * slot + 3 * part) % (MAX_RANK + 1) for part in range(len(widths))] for slot in range(SLOTS)]
    lora, slots = weights(k, widths, ranks), STEPS[step]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(slots), k, generator=generator)
    out = torch.randn(len(slots), sum(widths), generator=generator)
    exact = updated(reference, out.double(), x.double(), slots, lora)
    by_hand = out.double()
    for row, slot in enumerate(slots):
        for part, last in enumerate(lora.part_ends.tolist()):
            rank, first = (ranks[slot][part] if slot >= 0 else 0), last - widths[part]
            sums = lora.a[slot, part, :rank].double() @ x[row].double()
            by_hand[row, first:last] += sums @ lora.b[slot, :rank, first:last].double()
    torch.testing.assert_close(exact, by_hand)
    found = updated(kernels, out, x, slots, lora)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-5 * k**0.5 * MAX_RANK**0.5)
    untouched = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(found[untouched], out[untouched])


@pytest.mark.parametrize("isa", cpu.supported_isas())
def test_a_row_has_the_same_bits_in_every_step(isa: str) -> None:
    before = cpu.isa()
    cpu.use_isa(isa)
    lora = weights(301, [600, 47], [[19, 5]] * SLOTS)
    slots = [row % SLOTS for row in range(33)]
    generator = torch.Generator().manual_seed(2)
    x, out = torch.randn(33, 301, generator=generator), torch.randn(33, 647, generator=generator)
    together = updated(cpu, out, x, slots, lora)
    alone = torch.cat([updated(cpu, out[row : row + 1], x[row : row + 1], [slots[row]], lora) for row in range(33)])
    cpu.use_isa(before)
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rows": [0, 9]}, "rows: expected rows below 3, found 9"),
        ({"rows": [0, -1]}, "rows: expected rows below 3, found -1"),
        ({"tiles": [[5, 0, 2]]}, "tiles: expected slots below 5"),
        ({"tiles": [[0, 0, 3]]}, "tiles: expected slots below 5"),
        ({"ranks": [[20]] * SLOTS}, "ranks: expected 0 to 19, found 20"),
        ({"part_ends": [9]}, "part_ends: expected ascending columns up to 8, found 9"),
    ],
)
def test_arguments_are_checked(change: dict[str, list[int]], expected: str) -> None:
    lora, rows = weights(4, [8], [[3]] * SLOTS), rows_of([1, -1, 1], cpu.LORA_TILE)
    given = {"rows": rows.rows, "tiles": rows.tiles, "ranks": lora.ranks, "part_ends": lora.part_ends}
    given |= {name: torch.tensor(value, dtype=torch.int32) for name, value in change.items()}
    lora = LoraWeights(lora.a, lora.b, given["ranks"], given["part_ends"])
    rows = LoraRows(given["rows"], given["tiles"], rows.groups, are_all=False)
    with pytest.raises(ValueError, match=expected):
        cpu.add_lora(torch.zeros(3, 8), torch.zeros(2, 4), rows, lora)
