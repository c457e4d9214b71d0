"""`quire simulate` from outside: the file it writes, byte for byte, and what it refuses."""

import json
from pathlib import Path

import pytest

from quire.cli.commands import run

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
    assert "mean_batch" in shown.out
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
        (["--trace", "made"], "set rate in requests per second, or saturate"),
        (["--trace", "made", "--device", "abacus"], "device is 'abacus'"),
        (["--trace", "made", "--saturate", "--plot", "run.gif"], "must end in .png, .svg or .pdf"),
        (["--trace", "made", "--saturate", "--plot", "no/such/run.svg"], "there is no folder no/such"),
        (["--trace", "made", "--saturate", "--json", "no/such/run.json"], "there is no folder no/such"),
        ([], "no trace is given"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str, traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", *arguments]) == 2
    assert said in capsys.readouterr().err
