"""Scheduling policies and admission rules, replayed on every trace beside rivals that cannot be served.

    python -m benchmarks.policies TRACES_DIR [--trace NAME…] [--out FILE]

These are simulations of the scheduler itself (see `quire simulate`), so figures do not depend on the machine. Each
trace runs near the rate at which its engine is full, in five scenarios. Results are kept in FILE as JSON lines, and a
result that is there is not computed again. Prints the tables of docs/policies.md and the one of docs/benchmarks.md.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.simulation.devices import find_device
from quire.simulation.model_shapes import find_model_shape
from quire.simulation.settings import SimulationSettings
from quire.simulation.simulate import run_simulation
from quire.simulation.trace import Trace, TraceRow, find_trace, read_trace

TBT_LIMIT = 0.1


@dataclass(frozen=True)
class Setup:
    """Model and device of a trace. Memory is scarce, because policies differ in how they use it."""

    model: str
    device: str
    rate: float
    """Requests per second just above the engine's capacity."""
    num_requests: int
    limit: int
    """The largest max_tokens of a request."""
    kv_slots: int | None = None
    ttft_limit: float = 5.0


SETUPS = {
    "sharegpt_papermean": Setup("OPT-13B", "A100-40GB", 3.2, 600, 1024),
    "alpaca_like": Setup("OPT-13B", "A100-40GB", 65.0, 2000, 1024),
    "azure2023_conv": Setup("Llama-3.1-8B", "H100", 12.0, 1000, 1024, kv_slots=65_536),
    "azure2023_code": Setup("Llama-3.1-8B", "H100", 8.0, 1000, 2048, kv_slots=65_536),
    "sharegpt_turn_lengths": Setup("Llama-3.1-8B", "H100", 4.0, 600, 1024, kv_slots=65_536),
    "mooncake_conversation": Setup("Llama-3.1-8B", "H100", 1.0, 250, 2048, kv_slots=262_144, ttft_limit=30.0),
}

POLICIES = (
    ("fcfs", "current"),
    ("fcfs", "new-token-ratio"),
    ("fcfs", "predicted"),
    ("shortest", "current"),
    ("shortest", "predicted"),
    ("fair", "current"),
    ("oracle-shortest", "current"),
)

SCENARIOS = {
    "full load": "as recorded; everybody asks for the same most",
    "four fifths": "the same at four fifths of the rate",
    "overload": "the same at one and a third of the rate",
    "shift": "from half time on answers are twice as long",
    "adversary": "half of the requests are one tenant's, which asks for anything between what it needs and the most; "
    "the others are four tenants' that ask for the next power of two",
}
_LOAD = {"four fifths": 0.8, "overload": 4 / 3}
_HALF, _HONEST = 2, 4


def scenario_rows(name: str, rows: list[TraceRow], limit: int) -> list[TraceRow]:
    """The rows of a trace, changed as a scenario needs."""
    rows = [row._replace(output_tokens=min(limit, row.output_tokens)) for row in rows]
    if name == "shift":
        half = len(rows) // 2
        return rows[:half] + [row._replace(output_tokens=min(limit, 2 * row.output_tokens)) for row in rows[half:]]
    if name == "adversary":
        rng = random.Random(0)
        return [
            row._replace(tenant="adversary", max_tokens=rng.randint(row.output_tokens, limit))
            if number % _HALF
            else row._replace(
                tenant=f"honest {rng.randrange(_HONEST)}",
                max_tokens=min(limit, 1 << (row.output_tokens - 1).bit_length()),
            )
            for number, row in enumerate(rows)
        ]
    return rows


def replay(trace: Trace, setup: Setup, scenario: str, policy: str, admission: str) -> dict[str, Any]:
    """The figures of one simulation that the tables show."""
    settings = SimulationSettings(
        trace=trace.name,
        scheduling_policy=policy,
        admission=admission,
        rate=setup.rate * _LOAD.get(scenario, 1.0),
        kv_slots=setup.kv_slots,
        max_tokens=setup.limit,
        ttft_limit=setup.ttft_limit,
        tbt_limit=TBT_LIMIT,
    )
    rows = scenario_rows(scenario, trace.rows[: setup.num_requests], setup.limit)
    figures = run_simulation(
        Trace(trace.name, rows), find_model_shape(setup.model), find_device(setup.device), settings
    )
    honest = [tenant for name, tenant in figures["tenants"].items() if name != "adversary"]
    num_good = sum(tenant["finished"] * tenant["goodput_pct"] for tenant in honest)
    shown = ("goodput_per_s", "requests_per_s", "ttft_p50", "ttft_p99", "ttft_max", "tbt_p50", "tbt_p99", "preemptions")
    return {
        **{name: figures[name] for name in shown},
        "honest_goodput_pct": num_good / sum(tenant["finished"] for tenant in honest) if honest else None,
    }


def replay_all(folder: Path, names: list[str], out: Path) -> Iterator[dict[str, Any]]:
    """Run every combination that is not in `out` and append it. Yields all results."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    if out.exists():
        for line in out.read_text().splitlines():
            result = json.loads(line)
            known[result["trace"], result["scenario"], result["policy"], result["admission"]] = result
    for name in names:
        trace = read_trace(find_trace(name, folder))
        for scenario in SCENARIOS:
            for policy, admission in POLICIES:
                key = (name, scenario, policy, admission)
                if key not in known:
                    labels = {"trace": name, "scenario": scenario, "policy": policy, "admission": admission}
                    known[key] = {**labels, **replay(trace, SETUPS[name], scenario, policy, admission)}
                    with out.open("a") as file:
                        file.write(json.dumps(known[key]) + "\n")
                yield known[key]


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown: a table per scenario, a row per trace and policy."""
    lines = []
    for scenario, about in SCENARIOS.items():
        honest = scenario == "adversary"
        lines += [f"### {scenario.capitalize()}", "", f"{about[0].upper()}{about[1:]}.", ""]
        lines.append(
            "| trace | policy, admission | goodput /s | TTFT p50 / p99 s | worst wait s | TBT p50 / p99 ms "
            "| preemptions |" + (" honest tenants' goodput |" if honest else "")
        )
        lines.append("| --- | --- | --- | --- | --- | --- | --- |" + (" --- |" if honest else ""))
        for result in (result for result in results if result["scenario"] == scenario):
            first = (result["policy"], result["admission"]) == POLICIES[0]
            cells = [
                result["trace"] if first else "",
                f"{result['policy']}, {result['admission']}",
                f"{result['goodput_per_s']:.2f}",
                f"{result['ttft_p50']:.2f} / {result['ttft_p99']:.1f}",
                f"{result['ttft_max']:.1f}",
                f"{1e3 * result['tbt_p50']:.0f} / {1e3 * result['tbt_p99']:.0f}",
                f"{result['preemptions']}",
            ]
            if honest:
                cells.append(f"{result['honest_goodput_pct']:.0f} %")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def summary(results: list[dict[str, Any]]) -> str:
    """Markdown: a row per trace and scenario, goodput against first come, first served, and preemptions."""
    names = [f"{policy}, {admission}" for policy, admission in POLICIES]
    lines = [f"| scenario, trace | {' | '.join(names)} |", f"| --- {'| --- ' * len(names)}|"]
    for scenario in SCENARIOS:
        for trace in SETUPS:
            row = [r for r in results if (r["scenario"], r["trace"]) == (scenario, trace)]
            if not row:
                continue
            first = row[0]["goodput_per_s"]
            cells = [f"{first:.2f}/s, {row[0]['preemptions']}"]
            for result in row[1:]:
                change = f"{100 * (result['goodput_per_s'] / first - 1):+.1f} %" if first else "—"
                cells.append(f"{change}, {result['preemptions']}")
            lines.append(f"| {scenario}, {trace} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the traces")
    parser.add_argument("--trace", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--out", type=Path, default=Path("policies.jsonl"))
    options = parser.parse_args()
    results = list(replay_all(options.folder, options.trace, options.out))
    print(tables(results))
    print(summary(results))


if __name__ == "__main__":
    main()
