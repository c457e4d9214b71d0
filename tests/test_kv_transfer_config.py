"""KVTransferConfig: what is read, and what is refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from quire.errors import ConfigError
from quire.kv_transfer_config import KVTransferConfig

_CONSUMER = {"kv_role": "kv_consumer", "kv_key_file": "kv.key"}
_PRODUCER = {"kv_role": "kv_producer", "kv_key_file": "kv.key"}


@pytest.mark.parametrize(
    ("given", "gives", "fetches"),
    [
        (_PRODUCER, True, False),
        (_CONSUMER | {"kv_peers": ["a:1"]}, False, True),
        ({"kv_role": "kv_both", "kv_key_file": "kv.key", "kv_peers": "a:1, [::1]:2"}, True, True),
        ('{"kv_role": "kv_producer", "kv_key_file": "kv.key"}', True, False),
    ],
)
def test_roles(given: Any, gives: bool, fetches: bool) -> None:
    config = KVTransferConfig.read(given)
    assert (config.gives, config.fetches) == (gives, fetches)
    assert KVTransferConfig.read(config) is config


def test_peers_in_one_text() -> None:
    assert KVTransferConfig.read(_CONSUMER | {"kv_peers": "a:1, [::1]:2"}).kv_peers == ("a:1", "[::1]:2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "kv_transfer_config"),
        ([1], "kv_transfer_config"),
        ({"kv_rol": 1}, "kv_transfer_config has unknown"),
        ({"kv_role": "kv_producer"}, 'kv_key_file is None; give it, as in "kv_key_file": "kv.key"'),
        ({"kv_key_file": "kv.key"}, 'kv_role is None; give it, as in "kv_role": "kv_consumer"'),
        (_PRODUCER | {"kv_role": "producer"}, "kv_role is 'producer'; it must be kv_producer, kv_consumer or kv_both"),
        (_PRODUCER | {"kv_port": True}, "kv_port is True; it must be an integer from 0 to 65535"),
        (_PRODUCER | {"kv_port": 65536}, "kv_port is 65536"),
        (_PRODUCER | {"kv_connector": "NixlConnector"}, "kv_connector is 'NixlConnector'"),
        (_PRODUCER | {"kv_peers": ["a:1"]}, "a kv_producer fetches from nobody"),
        (_CONSUMER, "a kv_consumer needs the HOST:PORT of at least one producer"),
        *((_CONSUMER | {"kv_peers": [peer]}, "each must be HOST:PORT") for peer in ("a", "a:", ":1", "a:0", "a:b")),
    ],
)
def test_refusals(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        KVTransferConfig.read(given)
    assert message in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b" short \n"])
def test_keys_that_are_none(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "kv.key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"kv_transfer_config: .*kv\.key"):
        KVTransferConfig.read(_PRODUCER | {"kv_key_file": str(path)}).read_key()


def test_a_key_without_the_spaces_around_it(tmp_path: Path) -> None:
    path = tmp_path / "kv.key"
    path.write_bytes(b"0123456789abcdef\n")
    assert KVTransferConfig.read(_PRODUCER | {"kv_key_file": str(path)}).read_key() == b"0123456789abcdef"
