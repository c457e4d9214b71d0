"""Memory by kind: tiers below the pool (TierStats), recurrent states (StateStats), KV groups (KVGroupMemory)."""

from dataclasses import dataclass


@dataclass(slots=True)
class TierStats:
    """One tier below the pool. Counts are blocks unless said otherwise."""

    num_blocks: int = 0
    num_bytes: int = 0
    capacity_bytes: int = 0
    stopped: bool = False
    """Takes no more blocks, because writing failed; stored blocks are still found."""
    total_hits: int = 0
    """Tokens loaded from here instead of computed, of prompts and of resumed sequences."""
    total_saved: int = 0
    total_loaded: int = 0
    total_saved_bytes: int = 0
    total_loaded_bytes: int = 0
    total_dropped: int = 0
    """Not saved, because too many saves were in progress or writing failed."""
    total_evicted: int = 0
    """Evicted to make room."""
    total_corrupt: int = 0
    """Found truncated, altered or unreadable."""
    total_recomputed: int = 0
    """Computed although stored here, because that is faster by the measured rates."""


@dataclass(slots=True)
class StateStats:
    """Counts are slots; a slot holds the state of one sequence in all recurrent layers."""

    num_slots: int = 0
    num_running: int = 0
    """Slots of running sequences."""
    num_snapshots: int = 0
    """Slots with a snapshot that a prompt can be found to begin with."""
    num_pinned: int = 0
    """Snapshots that registered prefixes hold."""
    slot_bytes: int = 0
    total_saved: int = 0
    """Snapshots kept since the start."""
    total_evicted: int = 0
    """Snapshots whose slot was needed."""
    total_hits: int = 0
    """Sequences that started from a snapshot."""
    total_skipped: int = 0
    """Snapshots not taken, because no slot was free."""


@dataclass(slots=True)
class KVGroupMemory:
    """Blocks of the layers of one KV group."""

    window: int
    """0: full attention."""
    num_used_blocks: int
    num_cached_free_blocks: int
    """Free blocks that the prefix cache can still find, given-back ones included."""
