"""What passes between deciding and executing: the scheduler's StepPlan and the runner's StepResult.

Plain values only, so that either side can be replaced: the simulator executes plans without a model, and tests run
models without a scheduler. A sequence is identified by its row: the slot in the runner's persistent arrays that it
keeps from admission until it ends or is preempted.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from quire.image_input import ImagePlan
from quire.sampling_params import SamplingParams


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position. Entry 0 is the token at that position; the most likely tokens follow."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]
    """1-based rank of each token in the vocabulary."""


class BeamCandidates(NamedTuple):
    """The most likely next tokens of one beam, best first, after the request's parameters were applied."""

    token_ids: list[int]
    logprobs: list[float]
    """After the request's parameters were applied; a token of −inf is ruled out."""
    reports: list[TokenLogprobs]
    """Log-probabilities of each for the client; empty if it did not ask."""
    last: bool = False
    """The beam's grammar is complete: only an end token can follow, and it ends the sequence."""


class RowFork(NamedTuple):
    """A beam goes on in `row`: copy the runner's state of the sequence in `source`, and append the token."""

    row: int
    source: int
    token_id: int


def logprob_bytes(vocab_size: int, num_logprobs: int) -> int:
    """Memory for computing one position's `TokenLogprobs`. The memory plan reserves it, and the sampler keeps to it.

    It holds two float32 rows of the vocabulary (the logits, and a copy that is exponentiated or filtered), and for each
    reported token a score, an id and a log-probability, twice while they are collected.
    """
    num_reported = 1 + (vocab_size if num_logprobs < 0 else min(num_logprobs, vocab_size))
    return 2 * 4 * vocab_size + 2 * (4 + 8 + 8) * num_reported


@dataclass(frozen=True, slots=True)
class NewRow:
    """A sequence that starts in a row: all that the runner stores of it besides its block table."""

    row: int
    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    """Not empty for a resumed or forked sequence."""
    seed: int
    sample_index: int
    stop_token_ids: tuple[int, ...]
    """Tokens that `min_tokens` forbids at first: end of sequence and the request's own stop tokens."""
    adapter: str = ""
    """Hash of the adapter's content, which a slot of the model holds; empty: the model alone."""
    second_text: int = 0
    """As in `Request`."""
    images: tuple[tuple[int, int, int], ...] = ()
    """(index of its first token, height, width in pixels) of each image in the prompt."""


@dataclass(slots=True)
class OffloadPlan:
    """Copies between the pool and the tiers below it. The step makes them in this order, before it writes any KV.

    Hashes are those of `quire.kv_cache.block_hash`; a block is an index into the pool. After the pool's blocks come the
    slots of recurrent states. The step copies states from slot to slot before it loads.
    """

    evicted: list[tuple[str, bytes]] = field(default_factory=list)
    """(tier, hash): stored blocks to remove from a tier, to make room."""
    stores: list[tuple[str, bytes, int]] = field(default_factory=list)
    """(tier, hash, block): blocks to copy into a tier. The host tier holds them at once, the disk tier once written."""
    cancelled: list[bytes] = field(default_factory=list)
    """Finished reads whose sequence is gone: discard them."""
    loads: list[tuple[str, bytes, int]] = field(default_factory=list)
    """(tier, hash, block): content to copy into the pool, from host memory or from a finished read."""
    reads: list[bytes] = field(default_factory=list)
    """Blocks to read from the disk tier in the background; `OffloadResult` says when each has been read."""
    wait: bool = False
    """Nothing can be computed until a read finishes."""


@dataclass(slots=True)
class OffloadResult:
    """What finished in the background since the last step."""

    stored: list[bytes] = field(default_factory=list)
    """Blocks that the disk tier now holds."""
    failed_stores: list[bytes] = field(default_factory=list)
    """Blocks that could not be written."""
    read: list[tuple[bytes, float]] = field(default_factory=list)
    """(hash, seconds it took): blocks in memory, with the right checksum."""
    failed_reads: list[tuple[bytes, str]] = field(default_factory=list)
    """(hash, reason): "missing" or "corrupt". The disk tier no longer holds the block."""
    load_seconds: float = 0.0
    """Time that this step spent on loads from the host tier."""
    stopped: bool = False
    """Writing failed, so the disk tier takes no more blocks."""


@dataclass(slots=True)
class StepPlan:
    """One step's work. `rows`, `num_computed_tokens` and `num_scheduled_tokens` run in parallel, one entry per
    scheduled sequence."""

    batch_id: int = 0
    """Non-zero: every row computes one token and samples after it (`sample_rows == rows`), and nothing else happens: no
    new rows, forks, drafts, copies of blocks or states, vectors or prompt log-probabilities. If the plan before had the
    same id, this one repeats it: the same rows in the same order, each one position further. Only `token_ids` and
    `new_blocks`, which lengthens tables, are new; `offload` may come with it. An id never comes back after another one.
    Zero: this step repeats nothing."""
    rows: list[int] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    """Position of the first token computed: the number of tokens whose KV is already stored."""
    num_scheduled_tokens: list[int] = field(default_factory=list)
    """Tokens computed in this step."""
    token_ids: list[int] = field(default_factory=list)
    """The tokens computed, sequence after sequence: sum(num_scheduled_tokens) entries.

    An entry may be negative: ~row stands for the token that the step before samples for that row. It happens only if
    this step was planned before the result of that one was known."""
    sample_indices: list[int] = field(default_factory=list)
    """Indices into `rows`: sample after the last token of these. The same index n times where n samples fork."""
    sample_rows: list[int] = field(default_factory=list)
    """For each entry of `sample_indices`, the row whose sampling state samples and that gets the token."""
    drafts: dict[int, list[int]] = field(default_factory=dict)
    """Index into `sample_rows` → draft tokens: the last len(draft) tokens of that row in this step. One sample is taken
    before the first of them and one after each accepted one."""
    row_forks: list[RowFork] = field(default_factory=list)
    """Beams that go on since the last step. All forks read the rows as they were before any of them."""
    new_rows: list[NewRow] = field(default_factory=list)
    """Applied after `row_forks`, whose rows may belong to another sequence by now."""
    new_blocks: list[tuple[int, int, int, list[int]]] = field(default_factory=list)
    """(row, KV group, first index, blocks): changed entries of block tables. Written before anything is computed. −1
    stands for a block that the group does not hold, because no token of this step or a later one sees it."""
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, destination): copy-on-write. Done before anything is computed."""
    state_slots: list[int] = field(default_factory=list)
    """Slot of each row's recurrent state, parallel to `rows`; empty for a model without recurrent layers."""
    state_copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, destination) slots of recurrent states; source -1 is the state before the first token. They are copied
    in this order, before anything is computed."""
    state_saves: list[tuple[int, int, int]] = field(default_factory=list)
    """(index into `rows`, n, slot): after the row's first n tokens its recurrent state is also
    written to the slot."""
    pool_rows: list[int] = field(default_factory=list)
    """Indices into `rows`, ascending: return the text's vector, by default the hidden state of the last token computed,
    after the final norm. No sample is taken there."""
    prompt_logprobs: dict[int, tuple[int, list[int]]] = field(default_factory=dict)
    """Index into `rows` → (number of most likely tokens, the token that follows each computed position)."""
    images: ImagePlan | None = None
    """None if the step computes no tokens of an image."""
    offload: OffloadPlan | None = None
    """None without tiers, and if nothing is copied."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True)
class StepResult:
    """The outcome of a step. The lists run in parallel, one entry per sample in the order of `StepPlan.sample_rows`."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)
    """Why a sample failed. Its token is then meaningless, and only its sequence ends."""
    candidates: dict[int, BeamCandidates] = field(default_factory=dict)
    """Index into the lists → the candidates of a beam; its token is meaningless."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """Index into the plan's `rows` → one entry per computed position."""
    vectors: dict[int, bytes] = field(default_factory=dict)
    """For each of the plan's `pool_rows`, its vector: float32 values in the machine's byte order. Bytes, because a list
    of thousands of floats takes longer to send to another process."""
    vector_errors: dict[int, str] = field(default_factory=dict)
    """Index into the plan's `rows` → why its vector failed. It is then missing in `vectors`, and its sequence ends."""
    extra_token_ids: dict[int, list[int]] = field(default_factory=dict)
    """Index into `token_ids` → tokens that follow it: the samples after accepted draft tokens, then the tokens that a
    grammar forces without asking the model."""
    extra_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """Log-probabilities of `extra_token_ids`, for requests that ask. Such requests get no forced tokens."""
    terminated: list[int] = field(default_factory=list)
    """Indices into `token_ids` of the samples whose grammar is complete after all their tokens, extra ones included."""
    offload: OffloadResult | None = None
    """None without tiers."""
