"""What crosses between deciding and executing: the scheduler's StepPlan and the runner's StepResult.

Plain values only, so that either side can be replaced: the simulator executes plans without a model, the tests run
models without a scheduler. Sequences are known here by their row, the slot in the runner's persistent arrays that a
sequence keeps from admission until it ends or is preempted.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from quire.sampling_params import SamplingParams


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: entry 0 is the token that stands there, then the most likely ones."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]
    """1-based rank of each token in the vocabulary."""


class BeamCandidates(NamedTuple):
    """What may follow one beam: its most likely tokens, best first, as the request's parameters let them through."""

    token_ids: list[int]
    logprobs: list[float]
    """Edited as the request asks; −inf is ruled out."""
    reports: list[TokenLogprobs]
    """What the client is told of each, where it asked; else empty."""
    last: bool = False
    """The beam's text is whole by its grammar: whatever follows, an end token, ends the sequence."""


class RowFork(NamedTuple):
    """A beam that goes on: `row` takes over what the runner knows of the sequence in `source`, and one more token."""

    row: int
    source: int
    token_id: int


def logprob_bytes(vocab_size: int, num_logprobs: int) -> int:
    """Memory in which one position's `TokenLogprobs` are worked out: what the plan counts and the sampler keeps to.

    Two float32 rows of the vocabulary (the logits, and a copy that is exponentiated or filtered), and for each of
    the tokens reported a score, an id and a log-probability, twice while they are put together.
    """
    num_reported = 1 + (vocab_size if num_logprobs < 0 else min(num_logprobs, vocab_size))
    return 2 * 4 * vocab_size + 2 * (4 + 8 + 8) * num_reported


@dataclass(frozen=True, slots=True)
class NewRow:
    """A sequence that takes a row: all the runner must remember of it beyond its block table."""

    row: int
    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    """Not empty for a resumed or forked sequence."""
    seed: int
    sample_index: int
    stop_token_ids: tuple[int, ...]
    """Tokens that `min_tokens` holds back: end of sequence and the request's own."""


@dataclass(slots=True)
class OffloadPlan:
    """Copies between the pool and the tiers below it. The step makes them in this order, before it writes any KV.

    Hashes are those of `quire.kv_cache.block_hash`; a block is an index into the pool.
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
    new rows, forks, drafts, block copies or prompt log-probabilities. If the plan before had the same id, this one
    repeats it: the same rows in the same order, each one position further. Only `token_ids` and `new_blocks`, which
    lengthens tables, are new; `offload` may come with it. An id never comes back after another one.
    Zero: this step repeats nothing."""
    rows: list[int] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    """Position of the first token computed: the number of tokens whose KV is already stored."""
    num_scheduled_tokens: list[int] = field(default_factory=list)
    """Tokens computed in this step."""
    token_ids: list[int] = field(default_factory=list)
    """The tokens computed, sequence after sequence: sum(num_scheduled_tokens) entries."""
    sample_indices: list[int] = field(default_factory=list)
    """Indices into `rows` after whose last token a sample is drawn; n times the same one where n samples part."""
    sample_rows: list[int] = field(default_factory=list)
    """For each of those, the row whose sampling state draws it and gets the token."""
    drafts: dict[int, list[int]] = field(default_factory=dict)
    """Index into `sample_rows` → tokens that are guessed to come next, the last of those computed for its row. Samples
    are drawn where the first of them is guessed and after each that holds."""
    row_forks: list[RowFork] = field(default_factory=list)
    """Beams as the last step left them; they all start from what the rows held before any of them."""
    new_rows: list[NewRow] = field(default_factory=list)
    """Taken in after `row_forks`, whose rows may have changed hands since."""
    new_blocks: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """(row, first index, blocks): entries of block tables that changed, to be written before anything is computed."""
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, destination): copy-on-write of this step, done before anything is computed."""
    prompt_logprobs: dict[int, tuple[int, list[int]]] = field(default_factory=dict)
    """Index into `rows` → (how many, the token that follows each computed position)."""
    offload: OffloadPlan | None = None
    """None without tiers, and where nothing moves."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True)
class StepResult:
    """What came out. The lists run in parallel, one entry per sample, in the order of `StepPlan.sample_rows`."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)
    """Why a sample could not be drawn (its token is then meaningless); only that sequence ends."""
    candidates: dict[int, BeamCandidates] = field(default_factory=dict)
    """Index into the lists → what may follow, for a row that is a beam; its token is meaningless."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """Index into the plan's `rows` → one entry per computed position."""
    extra_token_ids: dict[int, list[int]] = field(default_factory=dict)
    """Index into `token_ids` → what follows it: the samples after drafted tokens that held, then the tokens that a
    grammar forces, of which the model was not asked."""
    extra_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """Of the samples in `extra_token_ids`, where asked for; nobody who asks gets forced tokens."""
    terminated: list[int] = field(default_factory=list)
    """Indices into `token_ids` of the samples whose grammar lets nothing follow, all of `extra_token_ids` included."""
    offload: OffloadResult | None = None
    """None without tiers."""
