"""`quire top` and `quire ps` against a real server."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from quire.cli.top import Screen
from quire.outputs import RequestMemory
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine
from tests.server.test_kv_stream import change, row


@pytest.fixture
def engine() -> ScriptedEngine:
    memory = RequestMemory("r7", True, 2, 30, 3, 28, 48, 16, 0, 0.4, 0, {"device": 5}, None)
    return ScriptedEngine(memory=[memory])


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[RunningServer]:
    with RunningServer(engine) as running:
        yield running


def quire(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "quire", *arguments], capture_output=True, text=True, timeout=60)


def test_ps_prints_the_report_of_the_server(server: RunningServer) -> None:
    shown = quire("ps", "--url", f"{server.url}/v1")
    assert shown.returncode == 0, shown.stderr
    assert "0 of 64 blocks" in shown.stdout
    assert "r7" in shown.stdout
    report = json.loads(quire("ps", "--url", server.url, "--json").stdout)
    assert report["requests"][0]["num_blocks"] == 3


def test_top_without_a_terminal_prints_once(server: RunningServer, engine: ScriptedEngine) -> None:
    def follow() -> None:
        if len(engine.views):
            engine.views.apply(change({0: 1 | 1 << 16}, [row(1, "")]))
        else:
            server._loop.call_later(0.02, follow)

    server._loop.call_soon_threadsafe(follow)
    shown = quire("top", "--url", server.url)
    assert shown.returncode == 0, shown.stderr
    assert "engine ready" in shown.stdout
    assert "tokens/s" in shown.stdout
    assert "r1" in shown.stdout
    assert "decoding" in shown.stdout
    assert "\x1b" not in shown.stdout


@pytest.mark.parametrize("command", ["ps", "top"])
@pytest.mark.parametrize(
    ("url", "status", "words"),
    [
        ("http://127.0.0.1:1", 1, "is the server running"),
        ("127.0.0.1:8000", 2, "give one such as http://"),
        ("ftp://x", 2, "give one such as http://"),
    ],
)
def test_a_wrong_url_is_one_line(command: str, url: str, status: int, words: str) -> None:
    shown = quire(command, "--url", url)
    assert shown.returncode == status
    assert words in shown.stderr
    assert shown.stderr.count("\n") == 1
    assert not shown.stdout


def test_a_missing_key_is_one_line() -> None:
    with RunningServer(ScriptedEngine(), ServerSettings(port=0, api_key=("k",))) as server:
        for command in ("ps", "top"):
            shown = quire(command, "--url", server.url)
            assert (shown.returncode, "401" in shown.stderr) == (1, True)
        assert quire("ps", "--url", server.url, "--api-key", "k").returncode == 0


def stats(**values: int) -> dict[str, Any]:
    names = "num_running num_waiting num_blocks num_used_blocks num_cached_free_blocks num_filled_slots " + (
        "num_allocated_slots num_shared_slots total_steps total_prompt_tokens total_generated_tokens "
        "total_preemptions total_prefix_queries total_prefix_hits total_block_copies total_evictions"
    )
    return {**dict.fromkeys(names.split(), 0), "tiers": {}, **values}


def test_rates_and_shares_follow_from_the_frames() -> None:
    screen = Screen()
    screen.apply({"state": "ready", "shape": {}, "stats": stats(total_generated_tokens=100)}, 10.0)
    after = stats(total_generated_tokens=300, num_blocks=10, num_used_blocks=5, num_allocated_slots=80)
    screen.apply({"state": "ready", "stats": {**after, "num_filled_slots": 60}}, 12.0)
    text = "\n".join(screen.summary(12.0))
    assert "100.0 generated" in text
    assert "5 of 10 used (50.0%)" in text
    assert "25.0% waste" in text
    assert "0.0 generated" in "\n".join(screen.summary(30.0)), "a silent stream means that nothing happens"
    screen.apply({"state": "restarting"}, 31.0)
    assert "engine restarting" in screen.summary(31.0)[0]
    assert len(Screen().summary(0.0)) == 1
