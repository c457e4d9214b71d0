"""The file of API keys: what it may hold, and that a fault names file, table, field, value and what is supported."""

import hashlib
from pathlib import Path

import pytest

from quire.errors import ConfigError
from quire.server.api_keys import ApiKey, read_keys
from quire.server.auth import Authenticator
from quire.server.settings import ServerSettings

DIGEST = hashlib.sha256(b"secret").hexdigest()


def written(folder: Path, text: str) -> str:
    file = folder / "keys.toml"
    file.write_text(text)
    return str(file)


def table(*lines: str, name: str = "a", key: str = 'key = "k"') -> str:
    return "\n".join(["[[keys]]", f'name = "{name}"', key, *lines, ""])


def test_every_field(tmp_path: Path) -> None:
    limits = ["max_concurrency = 2", "tokens_per_minute = 1_000", "queue_share = 0.5", 'models = ["m"]']
    text = table("admin = true", "priority = -3", *limits) + table(name="b", key=f'key_sha256 = "{DIGEST.upper()}"')
    full, plain = read_keys(written(tmp_path, text))
    assert full == ApiKey("a", hashlib.sha256(b"k").digest(), True, -3, 2, 1000, 0.5, ("m",))
    assert plain == ApiKey("b", bytes.fromhex(DIGEST), priority=0)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "holds no keys; supported: a table [[keys]] for each key"),
        ("keys = 3", "holds no keys"),
        ("keys = [3]", "holds no keys"),
        ("keys = []", "holds no keys"),
        ('[alice]\nkey = "x"', "holds 'alice'; supported: a table [[keys]]"),
        ("[[keys]", "is not TOML"),
        ("x = " + "[" * 5000, "is not TOML"),
        ('[[keys]]\nkey = "k"', "table 1: name is missing"),
        ('[[keys]]\nname = "a"', "table 1 (a): give either key or key_sha256"),
        (table(f'key_sha256 = "{DIGEST}"'), "table 1 (a): give either key or key_sha256"),
        (table() + table(key='key = "other"'), "table 2: name is 'a', as in an earlier table"),
        (table() + table(name="b"), "table 2: the key of 'b' is also that of 'a'"),
        (table("colour = 1"), "table 1: colour is not a field; supported: name, key, key_sha256, admin, priority"),
        (table(name=""), "name is ''; supported: a text of 1 to 64 letters"),
        (table(name="a b"), "name is 'a b'"),
        (table(key='key = " "'), "key is a text of 1 characters; supported: a text that is not empty"),
        (table(key="key = 12345"), "key is of type int; supported"),
        (table(key='key_sha256 = "abcdef"'), "key_sha256 is a text of 6 characters; supported: 64 hexadecimal digits"),
        (table('admin = "yes"'), "table 1: admin is 'yes'; supported: true or false"),
        (table("priority = 1.5"), "priority is 1.5; supported: a whole number"),
        (table("priority = 2147483647"), "priority is 2147483647; supported"),
        (table("priority = true"), "priority is True; supported"),
        (table("max_concurrency = 0"), "max_concurrency is 0; supported: a whole number from 1"),
        (table("tokens_per_minute = -1"), "tokens_per_minute is -1; supported: a whole number from 1"),
        (table("queue_share = 0"), "queue_share is 0; supported: a number above 0, at most 1"),
        (table("queue_share = 1.1"), "queue_share is 1.1; supported"),
        (table("queue_share = nan"), "queue_share is nan; supported"),
        (table("models = []"), "models is []; supported: a list of one or more model names"),
        (table('models = "m"'), "models is 'm'; supported"),
        (table("models = [1]"), "models is [1]; supported"),
    ],
)
def test_faults_are_told(tmp_path: Path, text: str, shown: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        ServerSettings(api_keys=file)
    assert str(caught.value).startswith(f"api_keys {file}")
    assert shown in str(caught.value)
    assert "12345" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"name = '\xe9'")
    (tmp_path / "long").write_bytes(b"#" * (2**20 + 1))
    for name, shown in (("none", "No such file"), ("", "cannot be read"), ("latin", "not TOML"), ("long", "at most")):
        with pytest.raises(ConfigError, match=shown):
            read_keys(str(tmp_path / name))


def test_both_kinds_of_keys_are_accepted(tmp_path: Path) -> None:
    file = written(tmp_path, table(key='key = " spaced "') + table(name="b", key=f'key_sha256 = "{DIGEST}"'))
    settings = ServerSettings(host="0.0.0.0", api_key=("plain",), api_keys=file)
    authenticator = Authenticator(settings)
    accounts = {
        authenticator.check_key([(b"authorization", b"Bearer " + key)]) for key in (b"plain", b"spaced", b"secret")
    }
    assert len({client.account for client in accounts}) == len({client.salt for client in accounts}) == 3
    assert {client.salt for client in accounts} == set(authenticator.salts)
    assert "secret" not in repr(settings)
    assert DIGEST not in repr(settings)
    with pytest.raises(ConfigError, match="the key of 'a' is also one of api_key"):
        ServerSettings(api_key=("spaced",), api_keys=file)
