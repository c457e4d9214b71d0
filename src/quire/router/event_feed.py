"""EventFeed: keeps the prefix index up to date from one server's KV events.

A message that is missing is asked for at the replay address, which is the address with a port higher by 1,000. If
nothing answers there, or the server has started again, what was known of the server is forgotten: knowing nothing
costs time, knowing something wrong costs more.
"""

import asyncio
import logging
import re
from typing import Any

from quire.kv_events.messages import (
    CPU,
    STORAGE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    EventsError,
    decode_events,
    low_bits,
)
from quire.kv_events.publisher import import_zmq
from quire.router.backend import Backend
from quire.router.renamed_blocks import RenamedBlocks
from quire.routing.fleet import Fleet
from quire.routing.prefix_index import DEVICE, DISK, HOST

logger = logging.getLogger(__name__)

REPLAY_PORTS_UP = 1000
REPLAY_SECONDS = 1.0
_WHOLE_PROMPT = ("full_attention", "mla_attention", "sink_full_attention")
"""Kinds of KV groups that keep every position. A prefix hit needs their blocks, whatever other groups hold."""
_TIERS = {CPU: HOST, STORAGE: DISK}


class EventFeed:
    """One subscription; `run` never returns."""

    def __init__(self, fleet: Fleet, server: str, address: str, backend: Backend | None = None) -> None:
        """`backend` gets the blocks if it is another engine. Raises `ConfigError` if ZMQ is missing."""
        if backend is not None:
            backend.blocks = RenamedBlocks(fleet.index.max_blocks)
        self._backend = backend
        self._zmq = import_zmq()
        self._fleet = fleet
        self._server = server
        self._address = address
        self._next: int | None = None
        """The number of the next message; None before the first."""
        self._other_groups: set[int] = set()
        """KV groups that keep only some positions, such as a window. Their blocks have the same hashes."""

    async def run(self) -> None:
        """Read events for ever."""
        import zmq.asyncio

        context = zmq.asyncio.Context()
        socket = context.socket(self._zmq.SUB)
        try:
            socket.subscribe(b"")
            socket.connect(self._address)
            while True:
                frames = await socket.recv_multipart()
                if len(frames) == 3 and len(frames[1]) == 8:
                    await self._receive(context, int.from_bytes(frames[1], "big"), frames[2])
        finally:
            context.destroy(linger=0)

    async def _receive(self, context: Any, number: int, content: bytes) -> None:
        wanted = self._next
        if wanted is None or number < wanted:  # the first message, or the server has started again
            self._fleet.cleared(self._server)
            wanted = 0
        if number > wanted and not await self._replay(context, wanted, number):
            self._fleet.cleared(self._server)
        self._read(number, content)

    async def _replay(self, context: Any, first: int, end: int) -> bool:
        """Ask for the messages from `first` to before `end`. Returns whether all have come."""
        address = replay_address(self._address)
        if address is None:
            return False
        socket = context.socket(self._zmq.DEALER)
        try:
            socket.connect(address)
            async with asyncio.timeout(REPLAY_SECONDS):
                await socket.send_multipart((b"", first.to_bytes(8, "big")))
                while first < end:
                    *_, number, content = await socket.recv_multipart()
                    if int.from_bytes(number, "big", signed=True) != first:
                        return False  # the server does not keep it any more
                    self._read(first, content)
                    first += 1
            return True
        except TimeoutError:
            return False
        finally:
            socket.close(linger=0)

    def _read(self, number: int, content: bytes) -> None:
        self._next = number + 1
        try:
            for event in decode_events(content):
                self.apply(event)
        except EventsError as error:
            logger.warning("KV events of %s: %s", self._server, error)
            self._fleet.cleared(self._server)

    def apply(self, event: Event) -> None:
        """Note what one event says."""
        if not isinstance(event, AllBlocksCleared) and not self._keeps_all(event):
            return
        match event:
            case BlockStored(block_hashes=hashes, medium=medium):
                keys = map(low_bits, hashes) if (blocks := self._renamed()) is None else blocks.stored(event)
                self._fleet.stored(self._server, keys, _TIERS.get(medium or "", DEVICE))
            case BlockRemoved(block_hashes=hashes, medium=medium):
                keys = map(low_bits, hashes) if (blocks := self._renamed()) is None else blocks.removed(event)
                self._fleet.removed(self._server, keys, _TIERS.get(medium or "", DEVICE))
            case AllBlocksCleared():
                self._fleet.cleared(self._server)

    def _renamed(self) -> RenamedBlocks | None:
        """The blocks under other names, for a server that is not Quire."""
        return None if self._backend is None or self._backend.is_quire else self._backend.blocks

    def _keeps_all(self, event: BlockStored | BlockRemoved) -> bool:
        """Whether an event is about a KV group that keeps every position."""
        group = event.group_idx or 0  # UNSET is false too
        if isinstance(event, BlockStored):
            if isinstance(event.kv_cache_spec_kind, str) and event.kv_cache_spec_kind not in _WHOLE_PROMPT:
                self._other_groups.add(group)
            elif event.kv_cache_spec_kind:
                self._other_groups.discard(group)
            elif group:  # its kind is not said: the first group stands for all
                self._other_groups.add(group)
        return group not in self._other_groups


def replay_address(address: str) -> str | None:
    """Where past events are asked for; None for an address without a port."""
    found = re.fullmatch(r"(tcp://.+:)(\d+)", address)
    return f"{found[1]}{int(found[2]) + REPLAY_PORTS_UP}" if found else None
