"""PromptHashes: tokens and block hashes of turns. A turn begins as the turn before it, whose hashes it keeps."""

from dataclasses import dataclass, field

from quire.kv_cache.block_hash import BlockHash, hash_block, root_hash
from quire.simulation.cluster_workload import Turn


@dataclass(slots=True)
class _Known:
    """The last prompt of a session."""

    pieces: tuple[tuple[int, int], ...] = ()
    hashes: list[BlockHash] = field(default_factory=list)


class PromptHashes:
    """Keeps the last prompt of each session that goes on."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._root = root_hash("", block_size)
        self._known: dict[int, _Known] = {}

    def of(self, turn: Turn, *, is_last: bool) -> tuple[list[int], list[BlockHash]]:
        """A prompt's tokens, and the hashes of its full blocks."""
        tokens: list[int] = []
        for content, length in turn.pieces:
            tokens += [content] * length
        known = self._known.pop(turn.session, None) or _Known()
        goes_on = turn.pieces[: len(known.pieces)] == known.pieces
        hashes, size = known.hashes if goes_on else [], self._block_size
        parent = hashes[-1] if hashes else self._root
        for start in range(len(hashes) * size, len(tokens) // size * size, size):
            parent = hash_block(parent, tokens[start : start + size])
            hashes.append(parent)
        if not is_last:
            self._known[turn.session] = _Known(turn.pieces, hashes)
        return tokens, hashes
