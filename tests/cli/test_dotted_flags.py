"""Keys of an object as flags of their own."""

import json

import pytest

from quire.cli.commands import run
from quire.cli.dotted_flags import join_dotted
from quire.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "joined"),
    [
        (["serve", "m", "--port", "1"], ["serve", "m", "--port", "1"]),
        (["--a.b", "c", "m"], ["m", "--a", {"b": "c"}]),
        (["--a.b=1", "--x", "--a.c.d", "[2]"], ["--x", "--a", {"b": 1, "c": {"d": [2]}}]),
        (["--a.b", "--c"], ["--c", "--a", {"b": True}]),
        (["--a.b", "-1"], ["--a", {"b": -1}]),
        (["--a.b=False"], ["--a", {"b": False}]),
        (["-cc.mode", "3"], ["-cc", {"mode": 3}]),
        (["--a.b", "1", "--", "--a.c", "x.y"], ["--a", {"b": 1}, "--", "--a.c", "x.y"]),
        (["--json=a.b", "a.b", "--file", "x.json"], ["--json=a.b", "a.b", "--file", "x.json"]),
    ],
)
def test_keys_become_one_object(arguments: list[str], joined: list[object]) -> None:
    assert join_dotted(arguments) == [word if isinstance(word, str) else json.dumps(word) for word in joined]


def test_a_key_is_one_thing() -> None:
    with pytest.raises(ConfigError, match="--a: b is given as a value and as an object"):
        join_dotted(["--a.b", "1", "--a.b.c", "2"])


def test_a_command_takes_them(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "serve",
        "--show-config",
        "--speculative-config.method",
        "ngram",
        "--speculative-config.prompt_lookup_max=4",
    ]
    assert run(words) == 0
    assert 'speculative-config = {"method": "ngram", "prompt_lookup_max": 4}  (flag)' in capsys.readouterr().out
