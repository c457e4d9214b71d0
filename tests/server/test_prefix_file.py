"""--prefix-file: its lines, the salts of the prefixes, and errors that keep a server from starting."""

import asyncio
from pathlib import Path

import pytest

from quire.errors import ConfigError
from quire.server.auth import Authenticator
from quire.server.prefix_file import read_prefixes, register_prefixes
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine, bundled_tokenizer

LINES = """{"prompt": "Speak, my lord."}

{"prompt_token_ids": [5, 6, 7]}
{"messages": [{"role": "system", "content": "Be brief."}]}
"""
KEYS = ("first-key", "second-key")


def test_a_server_registers_the_lines_for_all_its_keys(engine: ScriptedEngine, tmp_path: Path) -> None:
    file = tmp_path / "prefixes.jsonl"
    file.write_text(LINES)
    settings = ServerSettings(port=0, api_key=KEYS, prefix_file=str(file))
    with RunningServer(engine, settings) as server:
        server.client(KEYS[1]).completions.create(model="scripted", prompt="x")
        assert "prefixes: 3 to be computed and kept" in server.reports
    (text, salts), (ids, _), (chat, _) = engine.prefixes
    assert text == bundled_tokenizer().encode("Speak, my lord.")
    assert ids == [5, 6, 7]
    assert "Be brief." in bundled_tokenizer().decode(chat)
    keys = [Authenticator(settings).check_key([(b"authorization", b"Bearer " + key.encode())]).salt for key in KEYS]
    assert salts == tuple(keys)
    assert engine.calls[0].cache_salt == salts[1]


@pytest.mark.parametrize("options", [{}, {"api_key": KEYS, "share_prefix_cache": True}])
def test_without_tenants_there_is_one_salt(options: dict[str, object]) -> None:
    assert Authenticator(ServerSettings(**options)).salts == ("",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "x"}\n{"promt": "x"}', "line 2: Object contains unknown field `promt`"),
        ('{"prompt": 3}', "line 1: Expected `str | null`, got `int`"),
        ("{", "line 1: Input data was truncated"),
        ("{}", "line 1: give one of prompt, prompt_token_ids and messages"),
        ('{"prompt": "x", "prompt_token_ids": [1]}', "line 1: give one of prompt"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "prefixes.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_prefixes(ServerSettings(prefix_file=str(file)))
    assert words in str(caught.value)


def test_a_missing_file_and_a_refused_prefix(engine: ScriptedEngine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_prefixes(ServerSettings(prefix_file=str(tmp_path / "none")))
    file = tmp_path / "prefixes.jsonl"
    file.write_text('{"prompt_token_ids": [1]}\n{"prompt_token_ids": [' + "1," * 300 + "1]}")
    settings = ServerSettings(prefix_file=str(file))
    with pytest.raises(ConfigError, match=r"prefix 2: the prefix has 301 tokens"):
        asyncio.run(register_prefixes(engine, settings, read_prefixes(settings)))
    assert read_prefixes(ServerSettings()) == []
