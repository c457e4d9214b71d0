"""The modules of the page by themselves, in the browser: trees of messages, streams, the pool, charts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

SCRIPTS = Path(__file__).with_name("modules.js").read_text().partition("export default ")[2].rstrip(";\n")
EXPECTED: dict[str, Any] = {
    "events are read whole however they are cut": ['[{"a":1},{"b":"é"}]'],
    "a branch keeps its own history": [["one", "1"], ["s", "one", "2"], 2, 2, "one"],
    "results answer the calls in their order": [[[], ["a", "b"], ["b"], []], [0, 2, "a", "b"]],
    "a foreign conversation is checked": [True, 1, "m2"],
    "storage is bounded, the oldest goes first": [5, 50, "54", 4, 0],
    "frames add up to the pool": [
        ["shared", "shared", "shared", "used", "cached", "free", "free", "free"],
        {"free": 3, "cached": 1, "used": 1, "shared": 3, "pinned": 0},
        2,
        5,
        0,
        0,
    ],
    "rates come from differences, and start again with an engine": [20, 4, 0.25, 0.25, 100, None, False],
    "every reason of a miss is a sentence": True,
    "lines stay inside their chart": "M0.0 42.0H220.0V2.0H220",
    "wrong parameters are named": [
        ["Answers", "Temperature", "Top-p", "JSON", "JSON", "Tools", "Max"],
        {"n": 2, "stop": ["a", "b"], "tools": []},
        {"n": 2, "stop": ["a", "b"]},
    ],
}


@pytest.fixture(scope="module")
def page(chromium: Any) -> Any:
    with RunningServer(ScriptedEngine()) as server:
        context = chromium.new_context()
        opened = context.new_page()
        opened.goto(f"{server.url}/#learn")
        yield opened
        context.close()


@pytest.mark.parametrize("name", EXPECTED)
def test_modules(page: Any, name: str) -> None:
    assert page.evaluate(f"() => ({SCRIPTS})[{json.dumps(name)}]()") == EXPECTED[name]


def test_every_script_is_run() -> None:
    assert re.findall(r'^  "(.+)": async', SCRIPTS, flags=re.M) == list(EXPECTED)
