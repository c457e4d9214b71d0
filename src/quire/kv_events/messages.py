"""Messages of KV events: MessagePack of [time, events, data parallel rank].

vLLM writes an event as a map with its type since 0.24, and wrote it as an array before. Both are written and read here.
Fields that a reader does not know are skipped, so later versions can be read too.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from quire.errors import QuireError

Hash = int | bytes
"""The low 64 bits of a block hash, or all of it."""

GPU, CPU, STORAGE = "GPU", "CPU", "STORAGE"
"""Where a block is: the engine's pool, host memory, disk."""


class EventsError(QuireError):
    """Bytes that are no KV events."""


class BlockStored(msgspec.Struct, tag=True):
    """Blocks, each the next one's parent, can be found."""

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    """Tokens of all blocks; empty if they are unknown."""
    block_size: int
    lora_id: int | None = None
    medium: str | None = GPU
    lora_name: str | None = None
    extra_keys: list[Any] | UnsetType | None = UNSET
    """For each block, what else its hash covers: adapter, images, cache salt."""
    group_idx: int | UnsetType | None = UNSET
    """KV group, in engines that publish several."""
    kv_cache_spec_kind: str | UnsetType | None = UNSET
    """What the layers of the group keep, such as full_attention or sliding_window."""


class BlockRemoved(msgspec.Struct, tag=True):
    """Blocks can no longer be found in a medium."""

    block_hashes: list[Hash]
    medium: str | None = GPU
    group_idx: int | UnsetType | None = UNSET


class AllBlocksCleared(msgspec.Struct, tag=True):
    """The cache is empty."""


Event = BlockStored | BlockRemoved | AllBlocksCleared

_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in (BlockStored, BlockRemoved, AllBlocksCleared)}

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


def encode_events(time: float, events: Sequence[Event], *, as_arrays: bool = False) -> bytes:
    """One message."""
    if not as_arrays:
        return _encode([time, events, None])
    return _encode([time, [[type(event).__name__, *_positions(event)] for event in events], None])


def decode_events(data: bytes) -> list[Event]:
    """The events of a message in either form; kinds that are unknown are left out. Raises `EventsError`."""
    try:
        _, events, *_ = _decode(data)
        return list(_known(events))
    except (msgspec.DecodeError, msgspec.ValidationError, TypeError, ValueError, LookupError) as error:
        raise EventsError(f"a message of {len(data)} bytes is no list of KV events: {error}") from error


def low_bits(block_hash: Hash) -> int:
    """The low 64 bits of a block hash, in whichever form it was sent."""
    return int.from_bytes(block_hash[-8:], "big") if isinstance(block_hash, bytes) else block_hash & (2**64 - 1)


def _positions(event: Event) -> list[Any]:
    """The fields by position, up to the first one that is not set."""
    return list(takewhile(lambda value: value is not UNSET, msgspec.structs.astuple(event)))


def _known(events: Sequence[Any]) -> Iterator[Event]:
    for event in events:
        is_map = isinstance(event, Mapping)
        name = event["type"] if is_map else event[0]
        kind = _KINDS.get(name)
        if kind is not None:
            fields = event if is_map else zip(kind.__struct_fields__, event[1:], strict=False)
            yield msgspec.convert({"type": name, **dict(fields)}, kind)
