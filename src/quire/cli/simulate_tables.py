"""The tables that `quire simulate` prints: a row for each policy, a column with its unit for each headline figure."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A figure: its name in the result, two lines of heading, and how it is shown."""

    figure: str
    title: str
    unit: str
    factor: float = 1.0
    digits: int = 3


ENGINE = (
    Column("tokens_per_s", "generated", "tokens/s"),
    Column("mean_batch", "at once", "requests"),
    Column("token_states_pct", "KV memory", "% tokens"),
    Column("ttft_p99", "first token", "p99, s"),
    Column("normalized_latency_mean", "a token", "mean, ms", 1000.0),
)
"""The headline figures of one engine."""
CLUSTER = (
    Column("prefix_hit_pct", "hits", "%"),
    Column("of_oracle_pct", "oracle", "= 100"),
    Column("ttft_p50", "TTFT", "p50, s"),
    Column("ttft_p99", "TTFT", "p99, s"),
    Column("goodput_per_s", "goodput", "req/s"),
    Column("refused", "refused", "", digits=0),
    Column("most_work_to_mean", "load", "max/mean"),
    Column("device_hours_per_1k", "cost", "h/1,000"),
)
"""The headline figures of a cluster. The cost is hours of one device for a thousand requests that count for goodput."""


def print_table(name: str, rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> None:
    """Print `rows`, results of simulations, each under its `name`."""
    cells = [
        [name, *(column.title for column in columns)],
        ["", *(column.unit for column in columns)],
        *([str(row[name]), *(_show(row.get(column.figure), column) for column in columns)] for row in rows),
    ]
    widths = [max(map(len, places)) for places in zip(*cells, strict=True)]
    for line in cells:
        first, *others = zip(line, widths, strict=True)
        shown = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        print("  ".join(shown).rstrip())


def _show(value: float | None, column: Column) -> str:
    """A figure with about three digits that count."""
    if value is None:
        return "–"
    value *= column.factor
    if column.digits == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.{column.digits}g}"
