"""KVTransferConfig: which engines give KV blocks to others, and which fetch them. Names are vLLM's where it has any."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quire.errors import ConfigError
from quire.option_values import check_keys, read_object

PRODUCER, CONSUMER, BOTH = "kv_producer", "kv_consumer", "kv_both"
CONNECTOR = "QuireConnector"
MIN_KEY_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class KVTransferConfig:
    """Options of the transfer. Raises `ConfigError` for a value that it does not know."""

    kv_role: str
    """kv_producer gives its blocks to engines that ask for them, kv_consumer fetches them, kv_both does both."""
    kv_key_file: str
    """File with the key that all engines share; its content is at least 16 bytes, spaces at the ends left out."""
    kv_peers: tuple[str, ...] = ()
    """HOST:PORT of each producer to fetch from."""
    kv_ip: str = "127.0.0.1"
    """Address at which a producer listens."""
    kv_port: int = 14579
    kv_connector: str = CONNECTOR
    """The only one."""

    def __post_init__(self) -> None:
        if isinstance(self.kv_peers, str | list):
            peers = self.kv_peers.split(",") if isinstance(self.kv_peers, str) else self.kv_peers
            object.__setattr__(self, "kv_peers", tuple(str(peer).strip() for peer in peers))
        if self.kv_role not in (PRODUCER, CONSUMER, BOTH):
            self._refuse("kv_role", f"it must be {PRODUCER}, {CONSUMER} or {BOTH}")
        if self.kv_connector != CONNECTOR:
            self._refuse("kv_connector", f"Quire's engines speak only with each other; leave it out or say {CONNECTOR}")
        if type(self.kv_port) is not int or not 0 <= self.kv_port <= 65535:
            self._refuse("kv_port", "it must be an integer from 0 to 65535")
        for peer in self.kv_peers:
            host, _, port = peer.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                self._refuse("kv_peers", "each must be HOST:PORT")
        if self.fetches and not self.kv_peers:
            self._refuse("kv_peers", f"a {self.kv_role} needs the HOST:PORT of at least one producer")
        if not self.fetches and self.kv_peers:
            self._refuse("kv_peers", f"a {PRODUCER} fetches from nobody; leave it out or choose {BOTH}")

    def _refuse(self, name: str, wanted: str) -> None:
        raise ConfigError(f"kv_transfer_config: {name} is {getattr(self, name)!r}; {wanted}")

    @property
    def gives(self) -> bool:
        return self.kv_role != CONSUMER

    @property
    def fetches(self) -> bool:
        return self.kv_role != PRODUCER

    def read_key(self) -> bytes:
        """The shared key. Raises `ConfigError` for a file that has none."""
        try:
            key = Path(os.path.expanduser(self.kv_key_file)).read_bytes().strip()
        except OSError as error:
            raise ConfigError(
                f"kv_transfer_config: kv_key_file is {self.kv_key_file!r}, which cannot be read: {error.strerror}"
            ) from error
        if len(key) < MIN_KEY_BYTES:
            raise ConfigError(
                f"kv_transfer_config: the key in {self.kv_key_file!r} has {len(key)} bytes; give at least "
                f"{MIN_KEY_BYTES}, for example those of openssl rand -hex 32"
            )
        return key

    @classmethod
    def read(cls, value: "KVTransferConfig | Mapping[str, Any] | str") -> "KVTransferConfig":
        """From a mapping, or from JSON. Raises `ConfigError`."""
        if isinstance(value, KVTransferConfig):
            return value
        example = {"kv_role": CONSUMER, "kv_key_file": "kv.key"}
        value = read_object("kv_transfer_config", value, example)
        check_keys("kv_transfer_config", value, [field.name for field in fields(cls)])
        for name, text in example.items():
            if not isinstance(value.get(name), str):
                given = value.get(name)
                raise ConfigError(f'kv_transfer_config: {name} is {given!r}; give it, as in "{name}": "{text}"')
        return cls(**value)
