"""Flags as vLLM's command lines have them: keys of an object, and options that Quire lacks."""

import json

import pytest

from quire.cli.commands import run
from quire.cli.pasted_flags import RARE_FLAG, gather_rare, join_dotted
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


@pytest.mark.parametrize(
    ("arguments", "kept", "rare"),
    [
        (["serve", "m", "--port", "1"], ["serve", "m", "--port", "1"], None),
        (["--eplb-config", "{}", "m"], ["m"], {"eplb_config": {}}),
        (["--watermark=0.1", "-n", "2"], [], {"watermark": 0.1, "nnodes": 2}),
        (["--enable-dbo", "m", "--no-enable_eplb"], ["m"], {"enable_dbo": True, "enable_eplb": False}),
        (["--middleware", "a", "b", "--port", "1"], ["--port", "1"], {"middleware": ["a", "b"]}),
        (["--prompt=--enable-dbo", "--dbo", "x"], ["--prompt=--enable-dbo", "--dbo", "x"], None),
    ],
)
def test_options_that_quire_lacks_are_one_flag(arguments: list[str], kept: list[str], rare: object) -> None:
    tail = ["--", "--eplb-config"]
    shown = [RARE_FLAG, json.dumps(rare)] if rare is not None else []
    assert gather_rare([*arguments, *tail]) == [*kept, *shown, *tail]


def test_a_flag_without_its_value() -> None:
    with pytest.raises(ConfigError, match="--eplb-config needs a value"):
        gather_rare(["serve", "--eplb-config"])


def test_a_command_refuses_them_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--numa-bind", "--enable-dbo"]) == 2
    assert (
        capsys.readouterr().err == "quire: numa_bind is True; it must be False: start Quire under numactl or taskset\n"
    )


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
