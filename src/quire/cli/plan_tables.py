"""The tables that `quire plan` prints: no line is longer than 80 columns, on a terminal or in a file."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from quire.engine.image_memory import TEXT_TOKENS
from quire.engine.memory_plan import MemoryPlan
from quire.engine.memory_sizes import show_bytes
from quire.simulation.devices import Device

WIDTH = 80
_PLANNED_ONLY = "* a plan only: several devices that share this model were never measured"


def print_plan(figures: dict[str, Any], plan: MemoryPlan, note: str = "") -> None:
    """Print a plan as tables and sentences; `note` comes first."""
    _say(note)
    count, device = figures["num_devices"], figures["device"] or "this machine"
    _say(f"{figures['model']} on {_count(count, device)}, attention backend {plan.attention_backend}")
    _print_memory(plan)
    if resident := figures["peak_resident"]:
        shown = {part: show_bytes(size) for part, size in resident.items()}
        when = max("loading", "serving", key=lambda moment: resident[moment])
        _say(
            f"The system will show at most {shown['total']}: {shown[when]} while {when}, {shown['process']} of "
            f"interpreter and libraries, {shown['tokenizer']} of tokeniser."
        )
    print()
    _print_users(figures)
    if images := plan.images.tokens_per_image:
        _say(
            f"Users with an image of {images:,} tokens and {TEXT_TOKENS} of text that fit at once: "
            f"{plan.num_image_users:,}. The image encoder is {show_bytes(plan.images.weights)} of the weights."
        )
    planned_only = figures["planned_only"]
    if figures["expected"]:
        _print_expected(figures)
    else:
        print()
        _say(
            "How fast: name a --device (--list-devices shows them), or measure this machine with quire plan --measure "
            "cpu.json and give --device cpu.json."
        )
    if lines := figures.get("alternatives"):
        planned_only |= any(line.get("planned_only") for line in lines)
        _print_alternatives(lines, figures)
    if planned_only:
        _say(_PLANNED_ONLY)


def print_devices(devices: Iterable[Device], *, as_json: bool) -> None:
    """Print what is known of each device."""
    if as_json:
        print(json.dumps([asdict(device) for device in devices], indent=2))
        return
    rows = [
        (
            device.name,
            "CPU" if device.is_host else "card",
            f"{device.memory / 2**30:,.0f}",
            f"{device.bandwidth / 1e9:,.0f}",
            f"{device.matrix_rate / 1e12:,.2f}" if device.is_host else f"{device.matrix_rate / 1e12:,.0f}",
        )
        for device in devices
    ]
    columns = ("device", "kind", "memory, GiB", "bandwidth, GB/s", "TFLOP/s")
    _print_table("", columns, rows)
    _say(
        "TFLOP/s are of float16 on cards and of float32 on CPUs; a CPU's memory is that of a usual machine. Sources: "
        "--json."
    )


def _print_memory(plan: MemoryPlan) -> None:
    states = f"{plan.num_state_slots} slots of {show_bytes(plan.state_bytes)}"
    stored = plan.quantization or plan.stored or plan.dtype
    rows = [
        ("weights", plan.weights, stored if len(stored) < 40 else stored[:39] + "…"),
        ("activations", plan.activations, f"{plan.max_num_batched_tokens:,} tokens a step"),
        ("log-probabilities", plan.logprobs, ""),
        ("KV cache", plan.kv_cache, f"{plan.kv_cache_dtype}, {plan.num_blocks:,} blocks of {plan.block_size}"),
        ("recurrent states", plan.states, states),
        ("adapters", plan.adapters, ""),
        ("images", plan.images.num_bytes, f"up to {plan.images.tokens_per_image:,} tokens an image"),
        ("CUDA context", plan.context, ""),
        ("CUDA graphs", plan.graphs, ""),
        ("swap space", plan.swap_space, "of the host" if plan.device == "cuda" else ""),
        ("staging", plan.staging, "for the disk tier"),
    ]
    shown = [(name, show_bytes(size), how) for name, size, how in rows if size]
    shown.append(("together", show_bytes(plan.total), f"of {show_bytes(plan.available)} available"))
    _print_table("", ("memory", "size", ""), shown, left=(0, 2))
    if any(group.window for group in plan.kv_groups):
        _say(
            f"A sequence of {plan.max_model_len:,} tokens holds {plan.longest_blocks:,} blocks, since layers with a "
            "window give theirs back."
        )


def _print_users(figures: dict[str, Any]) -> None:
    fit, by_memory, context = figures["users_that_fit"], figures["users_by_memory"], figures["context"]
    per_token = show_bytes(figures["kv_bytes_per_1k_tokens"])
    why = "" if fit == by_memory else f", of max_num_seqs; the KV cache has room for {by_memory:,}"
    _say(f"KV of 1,000 tokens takes {per_token}. Users of {context:,} tokens that fit at once: {fit:,}{why}.")
    asked = max((row.get("users", 0) for row in figures["expected"]), default=0)
    if asked > fit:
        more = [
            f"{line['name']} ({line['users_that_fit']:,})"
            for line in figures.get("alternatives", ())
            if line.get("users_that_fit", 0) > fit
        ]
        _say(
            f"Of {asked:,} users {fit:,} fit, so the others wait. Fewer users or shorter contexts avoid that"
            + (f"; more fit with {', '.join(more)}." if more else ".")
        )


def _print_expected(figures: dict[str, Any]) -> None:
    first = figures["expected"][0]
    what = first.get("trace") or f"prompts of {first['prompt']:,} tokens, answers of {first['output']:,}"
    columns = ("users", "tokens/s", "req/s", "TTFT p50", "p99", "token p50", "p99", "preempted")
    rows = [
        (
            f"{row['users']:,}" if "users" in row else "trace",
            f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] >= 100 else f"{row['tokens_per_s']:.1f}",
            f"{row['requests_per_s']:.3g}",
            _seconds(row["ttft_p50"]),
            _seconds(row["ttft_p99"]),
            _seconds(row["tbt_p50"]),
            _seconds(row["tbt_p99"]),
            f"{row['preemptions']:,}",
        )
        for row in figures["expected"]
    ]
    name = _count(figures["num_devices"], figures["device"])
    _print_table(f"expected on {name}: {what}", columns, rows)


def _print_alternatives(lines: Sequence[dict[str, Any]], figures: dict[str, Any]) -> None:
    columns = ("what if", "weights", "KV/1,000", "KV tokens", "users fit", "tokens/s")
    rows = [
        (
            _count(line["num_devices"], line["name"]),
            show_bytes(line["weights"]),
            show_bytes(line["kv_bytes_per_1k_tokens"]),
            f"{line['kv_tokens']:,}",
            f"{line['users_that_fit']:,}",
            f"{line['tokens_per_s']:,.0f}" if "tokens_per_s" in line else "",
        )
        for line in lines
        if "refused" not in line
    ]
    asked = max((line.get("users", 0) for line in lines), default=0)
    _print_table(f"what would change, with {asked:,} users or as many as fit", columns, rows)
    print()
    refused: dict[str, list[str]] = {}
    for line in lines:
        if "refused" in line:
            reason = line["refused"].replace(line["name"], "…").partition(";")[0]
            refused.setdefault(reason, []).append(line["name"])
    for reason, names in refused.items():
        _say(f"Not possible: {', '.join(names)} ({reason})")


def _print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)
) -> None:
    """Columns as wide as their widest cell, two blanks between them; those of `left` are aligned to the left."""
    print(f"\n{title}" if title else "")
    widths = [max(len(row[place]) for row in (columns, *rows)) for place in range(len(columns))]
    for row in (columns, *rows):
        cells = [
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _count(count: int, name: str) -> str:
    return f"{count} × {name} *" if count > 1 else name


def _seconds(value: float | None) -> str:
    """A time as people read it."""
    if value is None:
        return ""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _say(text: str) -> None:
    """Print a sentence, wrapped between words."""
    if text:
        print(textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False))
