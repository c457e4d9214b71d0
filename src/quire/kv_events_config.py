"""KVEventsConfig: where and how the engine publishes what its KV cache holds. Names and meanings are vLLM's."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from quire.errors import ConfigError
from quire.option_values import check_keys, read_object

FORMATS = ("map", "array")
HASHES = ("quire", "sha256_cbor")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEventsConfig:
    """Options of the publisher. Raises `ConfigError` for a value that it does not know."""

    enable_kv_cache_events: bool = True
    """False: nothing is published."""
    publisher: str = "zmq"
    """zmq is the only one; null publishes nothing."""
    endpoint: str = "tcp://*:5557"
    """ZMQ address to publish at. One with * or ipc:// is bound, any other connected to."""
    replay_endpoint: str | None = None
    """ZMQ address that answers with past events."""
    buffer_steps: int = 10_000
    """Past messages that are kept for replay."""
    hwm: int = 100_000
    """Messages that wait for a slow subscriber; more are dropped."""
    topic: str = ""
    """First frame of every message. llm-d wants kv@ADDRESS:PORT@MODEL."""
    format: str = "map"
    """map: events as vLLM writes them since 0.24. array: as it did before."""
    hash: str = "quire"
    """quire: the engine's own block hashes. sha256_cbor: vLLM's, for indexes that also read vLLM."""

    def __post_init__(self) -> None:
        for name, known in (("publisher", ("zmq", "null")), ("format", FORMATS), ("hash", HASHES)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"kv_events_config: {name} is {getattr(self, name)!r}; it must be {' or '.join(known)}"
                )
        for name in ("endpoint", "replay_endpoint"):
            value = getattr(self, name)
            if value is not None and not str(value).startswith(("tcp://", "ipc://", "inproc://")):
                raise ConfigError(f"kv_events_config: {name} is {value!r}; write it as tcp://*:5557 or ipc://path")
        for name in ("buffer_steps", "hwm"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= 10**7:
                raise ConfigError(f"kv_events_config: {name} is {value!r}; it must be an integer from 1 to 10000000")

    def of_engine(self, index: int) -> "KVEventsConfig":
        """For the engine at `index` among equal ones: TCP ports that much higher, as vLLM's ranks have them."""

        def shifted(endpoint: str | None) -> str | None:
            address, _, port = (endpoint or "").rpartition(":")
            return f"{address}:{int(port) + index}" if port.isdecimal() else endpoint

        return replace(
            self, endpoint=shifted(self.endpoint) or self.endpoint, replay_endpoint=shifted(self.replay_endpoint)
        )

    @property
    def is_on(self) -> bool:
        return self.enable_kv_cache_events and self.publisher == "zmq"

    @classmethod
    def read(cls, value: "KVEventsConfig | Mapping[str, Any] | str") -> "KVEventsConfig":
        """From a mapping, or from JSON. Raises `ConfigError`."""
        if isinstance(value, KVEventsConfig):
            return value
        value = read_object("kv_events_config", value, {"endpoint": "tcp://*:5557"})
        check_keys("kv_events_config", value, [field.name for field in fields(cls)])
        return cls(**value)
