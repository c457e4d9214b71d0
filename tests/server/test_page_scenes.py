"""The scenes of the page's Learn view are what the scheduler does with the bundled model's tokens."""

import json
from typing import Any

import pytest

from scripts.write_page_scenes import FILE, record_scenes, sample_tokens


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


def test_the_scheduler_plays_the_scenes(kept: dict[str, Any]) -> None:
    assert json.loads(json.dumps(record_scenes(kept["tokens"]))) == kept


def test_the_tokens_are_the_bundled_models(kept: dict[str, Any]) -> None:
    assert sample_tokens() == kept["tokens"]


def test_the_scenes_show_what_their_titles_say(kept: dict[str, Any]) -> None:
    fills, shares, copies, runs_out = [scene["frames"] for scene in kept["scenes"]]
    assert [len(frame["sequences"][0]["table"]) for frame in fills[:-1]] == [3, 3, 4, 4, 4, 4]
    assert any({"A", "B"} <= set(block["holders"]) for frame in shares for block in frame["blocks"])
    assert [frame["copies"] for frame in copies if frame["copies"]] == [[[2, 3]]]
    states = [{each["name"]: each["state"] for each in frame["sequences"]}.get("B") for frame in runs_out]
    assert states.index("preempted") < len(states) - 1 - states[::-1].index("running")
    for frame in (frame for scene in kept["scenes"] for frame in scene["frames"]):
        assert len(frame["words"]) == 2
        used = sum(block["kind"] == "used" for block in frame["blocks"])
        assert used == len({block for each in frame["sequences"] for block in each["table"]})
