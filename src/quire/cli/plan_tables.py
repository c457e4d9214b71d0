"""The tables that `quire plan` prints."""

from collections.abc import Sequence
from typing import Any

from quire.engine.memory_sizes import show_bytes


def print_plan(figures: dict[str, Any], memory: Sequence[str]) -> None:
    """Print a plan as text and tables; `memory` has the lines that the engine prints at start."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for line in memory:
        console.print(line, markup=False)
    if resident := figures["peak_resident"]:
        shown = {part: show_bytes(size) for part, size in resident.items()}
        when = max("loading", "serving", key=lambda moment: resident[moment])
        console.print(
            f"the system will show at most {shown['total']}: {shown[when]} while {when}, {shown['process']} of "
            f"interpreter and libraries, {shown['tokenizer']} of tokeniser"
        )
    console.print(
        f"KV of 1,000 tokens takes {show_bytes(figures['kv_bytes_per_1k_tokens'])}; "
        f"users of {figures['context']} tokens that fit at once: {figures['users_that_fit']}"
    )
    if figures["expected"]:
        console.print(_expected(figures))
    else:
        console.print(
            "how fast: name a --device, or measure this machine with `quire plan --measure cpu.json` and give "
            "--device cpu.json"
        )
    if "alternatives" in figures:
        console.print(_alternatives(figures["alternatives"]))
        for line in figures["alternatives"]:
            if "refused" in line:
                console.print(f"{line['name']}: {line['refused']}", markup=False)


def _expected(figures: dict[str, Any]) -> Any:
    first = figures["expected"][0]
    what = first.get("trace") or f"prompts of {first['prompt']} tokens, answers of {first['output']}"
    name = f"{figures['num_devices']} × {figures['device']}" if figures["num_devices"] > 1 else figures["device"]
    columns = ("users", "tokens/s", "requests/s", "first token, s p50", "p99", "next token, ms p50", "p99", "preempted")
    rows = [
        (
            str(row.get("users", "trace")),
            f"{row['tokens_per_s']:,.1f}",
            f"{row['requests_per_s']:.3g}",
            _number(row["ttft_p50"]),
            _number(row["ttft_p99"]),
            _number(row["tbt_p50"], 1000),
            _number(row["tbt_p99"], 1000),
            str(row["preemptions"]),
        )
        for row in figures["expected"]
    ]
    return _table(f"expected on {name}: {what}", columns, rows)


def _alternatives(lines: Sequence[dict[str, Any]]) -> Any:
    columns = ("what if", "weights", "KV of 1,000 tokens", "KV tokens", "users that fit", "at users", "tokens/s")
    rows = []
    for line in lines:
        if "refused" in line:
            continue
        count = line["num_devices"]
        rows.append(
            (
                f"{count} × {line['name']}" if count > 1 else line["name"],
                show_bytes(line["weights"]),
                show_bytes(line["kv_bytes_per_1k_tokens"]),
                f"{line['kv_tokens']:,}",
                str(line["users_that_fit"]),
                str(line["users"]),
                f"{line['tokens_per_s']:,.1f}" if "tokens_per_s" in line else "",
            )
        )
    return _table("what would change", columns, rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _number(value: float | None, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:.3g}"
