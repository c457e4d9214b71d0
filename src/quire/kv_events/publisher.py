"""EventPublisher: sends messages of KV events over ZMQ, and past ones on request.

A message has three frames: topic, sequence number (8 bytes, big-endian), content. Past messages are asked for at a
ROUTER socket with the first wanted number; they come in the same three frames, and number −1 ends them. In the array
form, which is older, they come without the topic, as vLLM sent them then.
"""

import threading
from collections import deque
from typing import Any

from quire.errors import ConfigError
from quire.kv_events.messages import AllBlocksCleared, Event, encode_events
from quire.kv_events_config import KVEventsConfig

_END = (-1).to_bytes(8, "big", signed=True)


class EventPublisher:
    """Used by the engine's thread alone. The replay thread sleeps until it is asked."""

    def __init__(self, config: KVEventsConfig) -> None:
        """Raises `ConfigError` if ZMQ is missing or an address cannot be used."""
        zmq = import_zmq()
        self._as_arrays = config.format == "array"
        self._topic = config.topic.encode()
        self._past_topic = () if self._as_arrays else (self._topic,)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.set_hwm(config.hwm)
        self._socket.linger = 0
        self._number = 0
        self._lock = threading.Lock()
        self._past: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        try:
            _open(zmq, self._socket, config.endpoint, "endpoint")
            if config.replay_endpoint is not None:
                replies = self._context.socket(zmq.ROUTER)
                replies.linger = 0
                _open(zmq, replies, config.replay_endpoint, "replay_endpoint")
                threading.Thread(target=self._answer, args=(zmq, replies), daemon=True, name="kv-events").start()
        except ConfigError:
            self._context.destroy(linger=0)
            raise

    def publish(self, time: float, events: list[Event]) -> None:
        """Send one message. It never waits: a slow subscriber misses messages, and can ask for them."""
        content = encode_events(time, events, as_arrays=self._as_arrays)
        number, self._number = self._number, self._number + 1
        with self._lock:
            self._past.append((number, content))
        self._socket.send_multipart((self._topic, number.to_bytes(8, "big"), content))

    def close(self) -> None:
        """Close the sockets."""
        self._socket.close()
        self._context.term()  # wakes the replay thread, and waits until it has closed its socket

    def _answer(self, zmq: Any, replies: Any) -> None:
        while True:
            try:
                frames = replies.recv_multipart()
                if len(frames) != 3 or len(frames[2]) != 8:
                    continue  # not a question
                client, start = frames[0], int.from_bytes(frames[2], "big")
                with self._lock:
                    past = [message for message in self._past if message[0] >= start]
                for number, content in past:
                    replies.send_multipart((client, b"", *self._past_topic, number.to_bytes(8, "big"), content))
                replies.send_multipart((client, b"", *(b"" for _ in self._past_topic), _END, b""))
            except zmq.ContextTerminated:
                replies.close()
                return


def import_zmq() -> Any:
    """The module zmq. Raises `ConfigError` with the way to get it."""
    try:
        import zmq
    except ImportError:
        raise ConfigError("KV events need pyzmq; install it with: pip install 'quire-llm[events]'") from None
    return zmq


def cleared() -> list[Event]:
    """The first message of a new engine."""
    return [AllBlocksCleared()]


def _open(zmq: Any, socket: Any, address: str, name: str) -> None:
    is_bound = "*" in address or "::" in address or address.startswith(("ipc://", "inproc://"))
    try:
        socket.bind(address) if is_bound else socket.connect(address)
    except zmq.ZMQError as error:
        raise ConfigError(
            f"kv_events_config: {name} is {address!r}, which cannot be used: {error.strerror}; choose another address"
        ) from None
