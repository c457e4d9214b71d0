"""RecurrentPlan: the recurrent layers of one step, as the planner lays them out and kernels read them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ConvRows:
    """Where a step's tokens lie in one array in which width - 1 older inputs stand before each sequence's tokens.

    The array has T + B * (width - 1) rows; every tensor here holds rows of it.
    """

    tokens: Tensor
    """[T]: the row of each new token."""
    before: Tensor
    """[B * (width - 1)]: the rows of the older inputs."""
    after: Tensor
    """[B * (width - 1)]: the latest inputs once the step has ended."""
    saved: Tensor
    """[M * (width - 1)]: the latest inputs at each save."""


@dataclass(frozen=True, slots=True)
class ChunkRound:
    """Chunks first to end of a step: one of each sequence that has as many, so they can be computed together."""

    first: int
    end: int
    slots: Tensor
    """[end - first]: the state slot of each chunk's sequence."""
    saved: Tensor
    """Indices, from `first` on, of chunks after which the state is also saved."""
    save_slots: Tensor
    """The slots that it is saved to."""


@dataclass(frozen=True, slots=True)
class StepRound:
    """One token of each of some sequences, computed together."""

    rows: Tensor
    """Their tokens."""
    slots: Tensor
    """The state slot of each token's sequence."""
    saved: Tensor
    """Indices into these of tokens after which the state is also saved."""
    save_slots: Tensor
    """The slots that it is saved to."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """The tokens of a step's longer sequences, cut into N chunks of at most C tokens, in the order of `rounds`."""

    rows: Tensor
    """[N, C]: the token at each place; 0 for padding, which follows a chunk's tokens."""
    padding: Tensor
    """[N, C] bool."""
    tokens: Tensor
    """Every token in a chunk, and in `places` its index into the N * C places."""
    places: Tensor
    rounds: Sequence[ChunkRound]


@dataclass(frozen=True, slots=True)
class RecurrentPlan:
    """The recurrent layers of one step. All tensors are on the device, int64. `quire.attention.recurrence` makes it."""

    query_start_loc: Tensor
    """[B + 1]: the new tokens of sequence s are rows query_start_loc[s] to query_start_loc[s + 1]."""
    slots: Tensor
    """[B]: the state slot of each sequence, whose state the step replaces."""
    saves: Tensor
    """[M, 3]: (sequence, n, slot): the sequence's state after its first n new tokens is also written to the
    slot."""
    conv: ConvRows
    steps: Sequence[StepRound]
    """Sequences that are computed token by token: those of one token, and those that save after every token but the
    last, as drafts do. The n-th round has the n-th token of each sequence that has as many."""
    chunks: Chunks | None
    """The others; None if there are none."""
