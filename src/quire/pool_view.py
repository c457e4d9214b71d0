"""The KV pool as a viewer sees it: a word per block, a row per request, and what happened since the last look.

The engine process sends a `PoolChange` while somebody looks. The process that answers clients keeps the words of all
blocks and gives each viewer a `PoolFrame` with what that viewer lacks. Neither holds a prompt's text or tokens; those
are in `BlockDetail` and `RequestDetail`, which answer one question each.
"""

from dataclasses import dataclass, field

from quire.outputs import EngineStats, PrefixMiss

OWNER_BITS, REFS_BITS, FILL_BITS, FLAGS_BITS = 16, 8, 16, 8
"""Fields of a block's word, from the lowest bit up; the KV group is above them.

Owner: slot of the first request that holds the block, 0 for none. Refs: references, at most 255. Fill: slots with a
token. Flags: CACHED, PINNED."""
REFS_AT = OWNER_BITS
FILL_AT = REFS_AT + REFS_BITS
FLAGS_AT = FILL_AT + FILL_BITS
GROUP_AT = FLAGS_AT + FLAGS_BITS
CACHED, PINNED = 1, 2
"""Flags: the prefix cache can find the block; a registered prefix holds it."""

MAX_VIEWED_REQUESTS = 1000
"""Requests with a row. Blocks that only further requests hold have the owner `OTHERS`."""
OTHERS = 2**OWNER_BITS - 1
MAX_COPIES = 256
"""Copies on write that one change or frame names, the latest."""
MAX_DETAIL_TOKENS = 4096
MAX_DETAIL_HOLDERS = 64


@dataclass(frozen=True, slots=True)
class PoolShape:
    """What does not change while an engine lives."""

    num_blocks: int
    block_size: int
    windows: tuple[int, ...]
    """The window of each KV group, 0: full attention."""
    max_step_tokens: int
    """Token budget of a step."""


@dataclass(slots=True)
class RequestView:
    """An unfinished request. Token counts add up its samples."""

    slot: int
    """The owner in its blocks' words; from 1."""
    request_id: str
    tenant: str
    state: str
    """waiting, preempted, prefilling or decoding."""
    num_samples: int
    num_prompt_tokens: int
    """Tokens of one sample's prompt."""
    num_tokens: int
    num_computed_tokens: int
    num_blocks: int
    """Distinct blocks."""
    num_references: int
    """Entries of its block tables: above `num_blocks` where its samples share."""
    num_preemptions: int
    num_copied_blocks: int
    cached_tokens: dict[str, int]
    """Prompt tokens that were not computed, by the origin of their KV: device, host, disk."""
    miss: PrefixMiss | None
    """Why the rest of its prompt was not found in the cache."""


@dataclass(slots=True)
class PoolChange:
    """What changed in the engine since its last `PoolChange`."""

    shape: PoolShape | None
    """Set in the first change: nothing sent before it counts any more."""
    blocks: bytes
    """Indices of the changed blocks, uint32."""
    words: bytes
    """Their words, uint64."""
    requests: list[RequestView]
    """Rows that are new or changed."""
    ended: list[int]
    """Slots without a request from now on."""
    copies: list[tuple[int, int]]
    """Blocks copied on write, as (source, copy)."""


@dataclass(slots=True)
class PoolFrame:
    """What a viewer lacks. The first frame, and the first after a restart of the engine, begins from nothing."""

    state: str
    """State of the engine: ready, restarting, …"""
    shape: PoolShape | None = None
    """Set where the viewer has to begin from nothing: all blocks are free and empty, and there are no requests."""
    blocks: list[tuple[int, int, int, int, int, int, int]] = field(default_factory=list)
    """Runs of changed blocks that are alike: first block, number of blocks, owner, references, fill, flags, group."""
    requests: list[RequestView] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    stats: EngineStats | None = None
    """None for a viewer that does not see all."""
    latencies: dict[str, tuple[float, int]] | None = None
    """Sums of seconds and their counts since the start: first_token, next_token."""


@dataclass(slots=True)
class BlockHolder:
    """A sequence that holds a block."""

    request_id: str
    tenant: str
    sample: int
    position: int
    """The logical block."""


@dataclass(slots=True)
class BlockDetail:
    """One block: its holders and tokens."""

    block: int
    num_references: int
    fill: int
    cached: bool
    pinned: bool
    group: int
    seconds_since_taken: float
    hash: str
    """The first hexadecimal digits of its hash; empty without one."""
    holders: list[BlockHolder]
    """At most `MAX_DETAIL_HOLDERS`."""
    token_ids: list[int]
    """Tokens whose KV it holds; empty if no holder or cache entry says."""


@dataclass(slots=True)
class SampleDetail:
    """One sample of a request: its block table for each KV group, −1 for a block that was given back."""

    sample: int
    num_tokens: int
    num_computed_tokens: int
    tables: list[list[int]]


@dataclass(slots=True)
class RequestDetail:
    """One request: its tokens, its block tables, and the requests that share its blocks."""

    request: RequestView
    samples: list[SampleDetail]
    shared_with: dict[str, int]
    """Other requests → blocks that they share; at most `MAX_DETAIL_HOLDERS`."""
    token_ids: list[int]
    """The first sample's prompt and output, at most `MAX_DETAIL_TOKENS`."""
    truncated: bool
