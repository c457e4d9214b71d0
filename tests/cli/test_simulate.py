"""`quire simulate` from outside: the file it writes, byte for byte, and what it refuses."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from quire.cli.commands import run
from quire.cli.simulate_tables import CLUSTER
from quire.simulation.trace import BUNDLED_TRACES, TRACES

PROMISED = (
    *("policy", "requests", "finished", "mean_batch", "token_states_pct", "reservation_pct", "internal_pct"),
    *("external_pct", "normalized_latency_mean", "ttft_p50", "ttft_p99", "preemptions", "prefix_hit_pct"),
)


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "traces"
    folder.mkdir()
    rows = "".join(f"{7 * i % 90 + 1},{11 * i % 70 + 1}\n" for i in range(60))
    (folder / "made.csv").write_text(f"prompt_tokens,output_tokens\n{rows}")
    monkeypatch.setenv("QUIRE_TRACES", str(folder))
    return folder


@pytest.mark.parametrize("policy", ["paged", "orca-max", "orca-pow2", "orca-oracle", "fastertransformer"])
def test_figures_are_written_the_same_each_time(policy: str, traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = []
    for name in ("first.json", "second.json"):
        file = traces / name
        assert run(["simulate", "--trace", "made", "--policy", policy, "--rate", "3", "--json", str(file)]) == 0
        written.append(file.read_bytes())
    assert written[0] == written[1]
    figures = json.loads(written[0])
    assert set(PROMISED) <= figures.keys()
    assert (figures["policy"], figures["requests"], figures["finished"]) == (policy, 60, 60)
    shown = capsys.readouterr()
    assert "at once" in shown.out
    assert "mean_batch" not in shown.out
    assert "steps/s" in shown.err
    assert "\x1b" not in shown.err  # no bar where nobody watches


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture(ending: str, traces: Path) -> None:
    pytest.importorskip("matplotlib")
    file = traces / f"run.{ending}"
    assert run(["simulate", "--trace", str(traces / "made.csv"), "--saturate", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[ending])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trace", "mad", "--policy", "best"], "policy is 'best'; it must be one of paged"),
        (["--trace", "other"], "holds made.csv"),
        (["--trace", "made", "--duration", "5"], "set rate in requests per second, or saturate"),
        (["--trace", "made", "--policy", "paged,best"], "policy is 'best'"),
        (["--trace", "madder"], "none of sharegpt, sharegpt-turns, alpaca, mooncake"),
        (["--trace", "agents"], "trace is agents, which is made for clusters; give the replicas with --cluster N"),
        (["--routing", "sticky"], "routing is an option of a cluster; give its replicas with --cluster N"),
        (["--cluster", "2", "--routing", "sticky,best"], "routing is 'best'; it must be one of"),
        (["--cluster", "2", "--plot", "terminal"], "plot draws the run of one engine"),
        (["--trace", "made", "--device", "abacus"], "device is 'abacus'"),
        (["--trace", "made", "--saturate", "--plot", "run.gif"], "must end in .png, .svg or .pdf"),
        (["--trace", "made", "--saturate", "--plot", "no/such/run.svg"], "there is no folder no/such"),
        (["--trace", "made", "--saturate", "--json", "no/such/run.json"], "There is no folder no/such"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str, traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_without_options_the_paper_s_setting_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "--num-requests", "60", "--plot", "terminal"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= 80
    table = [line.split() for line in lines if line.startswith(("paged ", "orca-"))]
    assert [row[0] for row in table[:3]] == ["paged", "orca-oracle", "orca-max"]
    filled = [float(row[3]) for row in table[:3]]
    assert filled[0] > 95 > 50 > filled[1] > filled[2]
    assert "KV memory by use, %" in shown.out
    assert "paged: requests at once over time" in shown.out
    for policy in ("paged", "orca-oracle", "orca-max"):
        assert f"simulating {policy}" in shown.err  # not silent where no bar is drawn


@pytest.mark.parametrize("name", BUNDLED_TRACES)
def test_traces_of_the_package(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each runs by its name alone: where requests need a longer context, on a model that has one."""
    assert run(["simulate", "--trace", name, "--num-requests", "5", "--max-num-seqs", "8"]) == 0
    said = capsys.readouterr().out
    assert f"5 requests of {name}, " in said
    assert ("Llama-3.1-8B on H100" if name not in ("sharegpt", "alpaca") else "OPT-13B on A100-40GB") in said
    assert name in (TRACES / "README.md").read_text()


def test_several_policies_in_one_file_and_picture(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = traces / "all.json", traces / "all.svg"
    drawn = ["--plot", str(plot)] if find_spec("matplotlib") else []
    policies = ["--policy", "paged, orca-max", "--rate", "3", "--all-figures"]
    assert run(["simulate", "--trace", "made", *policies, "--json", str(file), *drawn]) == 0
    assert [figures["policy"] for figures in json.loads(file.read_text())] == ["paged", "orca-max"]
    assert "mean_batch" in capsys.readouterr().out
    assert plot.exists() == bool(drawn)


def test_a_cluster_compares_ways_to_route(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cluster", "2", "--routing", "least-work,round-robin", "--num-requests", "1", "--kv-slots", "90000"]
    assert run(["simulate", *options, "--json", str(tmp_path / "runs.json")]) == 0
    runs = {each["routing"]: each for each in json.loads((tmp_path / "runs.json").read_text())}
    assert runs["least-work"]["prefix_hit_pct"] > runs["round-robin"]["prefix_hit_pct"]
    assert all(each["device_hours_per_1k"] > 0 for each in runs.values())
    said = capsys.readouterr().out
    assert "1 session of agents on 2 replicas of Llama-3.1-8B" in said
    assert max(map(len, said.splitlines())) <= 80


def test_deaths_updates_and_limits_of_a_cluster_show_in_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runs.json"
    made = ["--num-requests", "2", "--rate", "1", "--kv-slots", "90000", "--json", str(file)]

    def table(*options: str, num_replicas: int = 2) -> tuple[dict[str, Any], dict[str, str]]:
        """The figures, and what the table shows of them."""
        assert run(["simulate", "--cluster", f"{num_replicas}", *made, *options]) == 0
        said = capsys.readouterr().out
        assert max(map(len, said.splitlines())) <= 80
        title, _, row, *_ = said.splitlines()[2:]
        assert title.split()[1:] == ["hits", "oracle", "TTFT", "TTFT", "goodput", "refused", "load", "cost"]
        shown = dict(zip((column.figure for column in CLUSTER), row.split()[1:], strict=True))
        return json.loads(file.read_text()), shown

    quiet, shown = table()
    assert (quiet["moved"], quiet["refused"], quiet["lost"]) == (0, 0, 0)
    assert float(shown["device_hours_per_1k"]) == pytest.approx(quiet["device_hours_per_1k"], rel=0.01)
    assert float(shown["goodput_per_s"]) == pytest.approx(quiet["goodput_per_s"], rel=0.01)
    deaths = [option for second in range(2, 62) for option in ("--deaths", f"{second}:{second // 2 % 2}")]
    failing, _ = table(*deaths, "--rolling-update", "90", "--restart-time", "0.5")
    assert (failing["moved"] > 0, failing["lost"], failing["finished"]) == (True, 0, quiet["finished"])
    assert failing["prefix_hit_pct"] < quiet["prefix_hit_pct"]
    assert failing["ttft_p99"] > quiet["ttft_p99"]
    full, shown = table("--max-replica-requests", "1", num_replicas=1)
    assert full["refused"] == int(shown["refused"]) > 0


def test_groups_of_prompts_find_their_beginning(tmp_path: Path) -> None:
    """750 prompts of 150 groups: 80 requests meet some groups again."""
    file, options = tmp_path / "runs.json", ["--rate", "400", "--num-requests", "80", "--max-model-len", "7264"]
    assert run(["simulate", "--cluster", "2", "--trace", "groups", *options, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["oracle_hit_pct"] > 10
    assert figures["of_oracle_pct"] > 50
    assert figures["finished"] == 80
