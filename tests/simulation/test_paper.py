"""What docs/paper.md says, on less of its traces: the set-ups stay the paper's, and claims keep coming out."""

import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper import __main__ as program
from benchmarks.paper import experiments
from benchmarks.paper.experiments import (
    BLOCK_SIZES,
    CHAT,
    CHAT_LIMIT,
    PANELS,
    PREFIXES,
    SECTIONS,
    SHARING,
    Knee,
    find_knee,
    jobs_for,
    jobs_of,
    run_jobs,
    simulated,
    trace_of,
)
from benchmarks.paper.page import write_page, write_section
from quire.simulation.model_shapes import MODEL_SHAPES

PRINTED_TOKEN_STATES = {"orca-max": 20.4, "orca-pow2": 26.8, "orca-oracle": 38.2}


@pytest.mark.parametrize("policy", PRINTED_TOKEN_STATES)
def test_waste_of_the_baselines_is_near_what_is_printed(policy: str) -> None:
    figures = simulated(PANELS[0], policy=policy, saturate=True)
    assert figures["kv_slots"] == 15_728
    assert figures["token_states_pct"] == pytest.approx(PRINTED_TOKEN_STATES[policy], abs=2.0)
    if policy == "orca-max":
        assert figures["mean_batch"] == pytest.approx(7)
        assert figures["external_pct"] == pytest.approx(8.9, abs=0.1)


def test_paging_fills_the_memory_and_runs_more_at_once() -> None:
    figures = {
        policy: simulated(PANELS[0], policy=policy, saturate=True, num_requests=400)
        for policy in ("paged", "orca-oracle", "orca-max")
    }
    assert figures["paged"]["token_states_pct"] >= 96
    assert figures["paged"]["token_states_of_pool_pct"] >= 95
    assert figures["paged"]["mean_batch"] >= 2.2 * figures["orca-oracle"]["mean_batch"]
    assert figures["paged"]["mean_batch"] >= 4.3 * figures["orca-max"]["mean_batch"]


def test_a_knee_is_where_latency_crosses_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "SECONDS", 60.0)
    knee: Knee = find_knee(PANELS[0], "orca-max")
    assert all((latency <= experiments.THRESHOLD) == (rate <= knee.rate) for rate, latency in knee.points)
    assert min(rate for rate, latency in knee.points if latency > experiments.THRESHOLD) <= 1.03 * knee.rate


def test_chat_keeps_the_last_tokens_only() -> None:
    rows = trace_of(CHAT).rows
    assert max(row.prompt_tokens for row in rows) == CHAT_LIMIT
    assert max(row.prompt_tokens + row.output_tokens for row in rows) <= MODEL_SHAPES[CHAT.model].context_length


def test_swapping_small_blocks_is_slow_and_recomputing_does_not_care() -> None:
    costs = [experiments.swap_and_recompute(256, size) for size in BLOCK_SIZES]
    swaps, recomputes = zip(*costs, strict=True)
    assert list(swaps) == sorted(swaps, reverse=True)
    assert len(set(recomputes)) == 1
    assert swaps[0] > recomputes[0] > swaps[-1]
    # 256 tokens of 800 KiB there and back at 25 GB/s, and 80 copies of 10 µs each way for one block.
    assert swaps[-1] == pytest.approx(2 * (256 * 819_200 / 25e9 + 80 * 1e-5))


def test_beams_save_most_of_their_memory_and_samples_little() -> None:
    """Fig. 15, on an eighth of its time: within a fifth of what is printed for beams."""
    for width, printed in ((2, 37.56), (4, 53.13), (6, 55.16)):
        beams, samples = (
            simulated(PANELS[3], **{option: width}, rate=16.0 / width, duration=40.0)["saved_by_sharing_pct"]
            for option in ("beam_width", "n")
        )
        assert beams == pytest.approx(printed, rel=0.2)
        assert 4 < samples < 16


def test_the_longer_the_shared_prefix_the_more_is_gained() -> None:
    """Fig. 16: at a rate that the baseline cannot sustain, one that holds the prefix can."""
    for panel, rate in zip(PREFIXES, (40.0, 24.0), strict=True):
        held, computed = (
            simulated(panel, policy=policy, rate=rate, duration=60.0)["normalized_latency_mean"]
            for policy in ("paged", "orca-oracle")
        )
        assert held < experiments.THRESHOLD < computed


def made_up(multiple: float) -> dict[str, Any]:
    """Results of `run_jobs` in which Quire sustains `multiple` times the rate of all others."""
    orcas = ("orca-max", "orca-pow2", "orca-oracle", "paged")
    row = dict.fromkeys(("normalized_latency_mean", "prefix_hit_pct", "mean_batch", "rate", "preemptions"), 1.0)
    row |= dict.fromkeys(("token_states_pct", "reservation_pct", "internal_pct", "external_pct"), 5.0)
    row |= {"token_states_of_pool_pct": 5.0, "saved_by_sharing_pct": 5.0, "peak_batch": 1}
    row |= {"unbounded_prefix_hit_pct": 30.0, "unbounded_prefix_hit_tokens_pct": 31.0}
    return {
        "knees": [
            Knee(panel, policy, multiple if policy == "paged" else 1.0, [])
            for panel in (*PANELS, CHAT, *SHARING, *PREFIXES)
            for policy in experiments.POLICIES
        ],
        "fig_2": [{**row, "policy": policy} for policy in orcas],
        "fig_13": [{**row, "policy": policy, "trace": name} for name in ("sharegpt", "alpaca") for policy in orcas],
        "fig_15": [
            {**row, "trace": trace, "option": option, "width": width} for trace, option, width, _ in experiments.SAVINGS
        ],
        "fig_17": [row] * 4,
        "fig_18": [{**row, "trace": "sharegpt", "block_size": size} for size in BLOCK_SIZES],
        "fig_19": [(size, *experiments.swap_and_recompute(256, size)) for size in BLOCK_SIZES],
        "preempted": [{**row, "block_size": 16, "swaps": swaps} for swaps in (True, False)],
        "bounds": [(panel.label, 1.5) for panel in experiments.BOUND],
        "beams": [row] * 2,
        "hits": [{**row, "kv_slots": slots, "tiers": tiers} for tiers, _ in experiments.TIERS for slots in (1, 2)],
    }


def test_the_page_has_every_figure_and_its_verdicts_follow_the_results() -> None:
    pages = {multiple: write_page(made_up(multiple)) for multiple in (1.0, 2.3)}
    for page in pages.values():
        for figure in ("2", "12", "13", "14", "15", "16", "17", "18b", "19"):
            assert f"## Fig. {figure}:" in page
        assert max(map(len, page.splitlines())) <= 220  # tables; all else is wrapped
    six_beams = "at six beams (printed 2.3×): "
    assert six_beams + "does not" in pages[1.0].replace("\n", " ")
    assert six_beams + "comes out" in pages[2.3].replace("\n", " ")
    assert "of the Orcas, printed 2×: does not" in pages[1.0].replace("\n", " ")
    assert "of the Orcas, printed 2×: comes out" in pages[2.3].replace("\n", " ")


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_alone_needs_its_own_simulations_only(section: str) -> None:
    """What `make paper ARGS='--only fig12'` runs is enough for its section, which is that of the whole page."""
    jobs, made = jobs_for(section), made_up(2.0)
    assert sum(map(len, jobs.values())) < sum(map(len, jobs_of().values()))
    results = {name: made[name] for name in jobs} | {"fig_19": made["fig_19"]}
    if "knees" in jobs:
        wanted = [arguments for _, arguments in jobs["knees"]]
        results["knees"] = [knee for knee in made["knees"] if (knee.panel, knee.policy) in wanted]
        assert len(results["knees"]) == len(wanted) < len(made["knees"])
    text = write_section(section, results)
    assert text.startswith("## ")
    assert text in write_page(made)


def test_the_sections_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*SECTIONS]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "fig3"], "invalid choice: 'fig3' (choose from"),
        (["--workers", "0"], "0 must be a whole number of at least 1"),
        (["--docs", __file__], "test_paper.py is no folder to write in"),
        (["--docs", "none/at/all"], "none/at/all is no folder to write in"),
    ],
)
def test_what_the_program_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(arguments)
    assert said in capsys.readouterr().err


def test_a_section_is_printed_and_a_dead_process_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "run_jobs", lambda jobs, workers, report: report(1, 4, "fig_2 1 of 4") or made_up(2.0))
    assert program.main(["--only", "fig2"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("## Fig. 2")
    assert "1 of 4, about" in shown.err

    def killed(*_: Any) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr(program, "run_jobs", killed)
    assert program.main(["--only", "fig2"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("paper: a simulation's process was killed")


@pytest.mark.parametrize("to_all", [True, False])
def test_ctrl_c_ends_it_with_its_processes(to_all: bool) -> None:
    """A terminal sends it to all processes, a supervisor to the first."""
    command = [sys.executable, "-m", "benchmarks.paper", "--only", "fig12", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        assert "simulations on 2 processes" in process.stderr.readline()
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        assert process.stderr.read() == "paper: interrupted; nothing was written\n"
        assert process.wait(30) == 130
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_progress_is_reported_for_every_simulation() -> None:
    said: list[tuple[int, int, str]] = []
    jobs = {"costs": [(experiments.swap_and_recompute, (256, size)) for size in (16, 32)]}
    results = run_jobs(jobs, 1, lambda *line: said.append(line))
    assert results["costs"] == [experiments.swap_and_recompute(256, size) for size in (16, 32)]
    assert [line[:2] for line in said] == [(1, 2), (2, 2)]
    assert {line[2] for line in said} == {"costs 1 of 2", "costs 2 of 2"}
