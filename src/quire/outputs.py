"""Results of the engine: RequestOutput with one CompletionOutput per sample, stats, and the memory report.

Names that users see are vLLM's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from quire.memory_stats import KVGroupMemory, StateStats, TierStats
from quire.step import TokenLogprobs


@dataclass(slots=True)
class Logprob:
    """One token's log-probability, its 1-based rank in the vocabulary, and its text if there is a tokenizer."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""Token id → Logprob for one position; the token at that position comes first."""


@dataclass(slots=True)
class CompletionOutput:
    """One sample: the whole of it from `LLM`, a delta in a stream of `AsyncLLM`."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    """"stop", "length", "abort" or "error"; None until the sample ends."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended the sample; None for an end-of-sequence token."""
    error: str | None = None
    """The reason if `finish_reason` is "error"."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def extend(self, delta: "CompletionOutput") -> None:
        """Append a later delta."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.cumulative_logprob = delta.cumulative_logprob
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.error = delta.error


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request in seconds on the engine's monotonic clock, and counts."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    """Draft tokens that were computed."""
    num_accepted_tokens: int = 0
    """Draft tokens that were accepted."""

    def note_tokens(self, now: float) -> None:
        """Tokens have come."""
        self.first_token_time = self.first_token_time or now
        self.last_token_time = now


@dataclass(slots=True)
class RequestOutput:
    """The state of one request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    metrics: RequestMetrics | None = None
    vector: bytes | None = None
    """The vector of the prompt (see `StepResult.vectors`), for the task embed."""

    def extend(self, delta: "RequestOutput") -> None:
        """Append a later delta of the same stream: the deltas add up to the whole output."""
        mine = {output.index: output for output in self.outputs}
        for output in delta.outputs:
            if output.index in mine:
                mine[output.index].extend(output)
            else:
                self.outputs.append(output)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = (self.prompt_logprobs or []) + delta.prompt_logprobs
        self.finished = delta.finished
        self.num_cached_tokens = delta.num_cached_tokens
        self.metrics, self.vector = delta.metrics, delta.vector


@dataclass(frozen=True, slots=True)
class RegisteredPrefix:
    """A prefix that stays in the cache: returned by `LLM.register_prefix`, argument of `unregister_prefix`."""

    prefix_id: str
    num_tokens: int
    num_kept_tokens: int
    """Tokens in full blocks; the rest of the prefix is computed with each request."""


@dataclass(slots=True)
class BeamSearchSequence:
    """One finished beam."""

    tokens: list[int]
    """Prompt and output tokens."""
    text: str
    """Text of `tokens`; empty if the model has no tokenizer."""
    cum_logprob: float
    """Log-probability of the output tokens."""
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: list[PositionLogprobs] | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """Progress of a request besides its tokens."""

    first_scheduled_time: float
    num_cached_tokens: int
    num_preemptions: int
    num_draft_tokens: int
    num_accepted_tokens: int


@dataclass(slots=True)
class SequenceDelta:
    """What one step added to one sample, before detokenisation."""

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    ends_with_text: bool = False
    """The finish reason is stop, but the last token belongs to the text: it completed the grammar."""
    error: str | None = None
    cumulative_logprob: float | None = None
    """Log-probability of a finished beam; its tokens come in one delta."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Log-probabilities of the prompt tokens that this step computed, the first prompt token excepted."""
    vector: bytes | None = None
    """The vector of the prompt: the only delta of a request of the task embed has one."""
    counts: RequestCounts | None = None
    """None if unchanged since this sample's previous delta."""


SampleId = tuple[str, int]
"""(request id, index)."""


@dataclass(slots=True)
class StepDeltas:
    """What one step added to all samples.

    Most samples gain one token and nothing else. They have no `SequenceDelta`, because hundreds of these objects would
    cost more than all other host work of a step.
    """

    samples: list[SampleId] = field(default_factory=list)
    """Samples that gained one token and nothing else. The list is not changed afterwards."""
    token_ids: list[int] = field(default_factory=list)
    """The token of each of `samples`."""
    batch_id: int = 0
    """Non-zero: `samples` equals `samples` of the last deltas with the same id (see `StepPlan.batch_id`)."""
    others: list[SequenceDelta] = field(default_factory=list)
    """Deltas with more than a token: a sample's first and last ones, log-probabilities, errors, …"""

    def __len__(self) -> int:
        return len(self.samples) + len(self.others)

    def __iter__(self) -> Iterator[SequenceDelta]:
        """All deltas, also those of `samples`."""
        yield from self.others
        for (request_id, index), token_id in zip(self.samples, self.token_ids, strict=True):
            yield SequenceDelta(request_id, index, [token_id])


class PrefixMiss(NamedTuple):
    """Where a prompt stops matching the prefix cache, and why."""

    block: int
    """The first logical block that had to be computed."""
    reason: str
    """new: no cached prompt begins like this; differs: cached prompts continue differently; evicted: the block was
    cached before; salt: it may be cached, but for another tenant; state: the block is cached, but no snapshot of the
    model's recurrent state was kept there."""
    evicted_seconds_ago: float | None
    """None also where an eviction is too long ago to be remembered."""
    window: int = 0
    """The window of the KV group that lacks the block, or one before it that the window still covers; 0: full
    attention."""


@dataclass(slots=True)
class RequestMemory:
    """Memory of one unfinished request. A slot holds the KV of one token."""

    request_id: str
    running: bool
    num_sequences: int
    num_tokens: int
    """Prompt and output tokens of all its sequences; shared ones count once per sequence."""
    num_blocks: int
    """Distinct blocks."""
    num_filled_slots: int
    num_allocated_slots: int
    num_shared_slots: int
    """Slots saved by sharing, among its sequences and with other requests."""
    num_copied_slots: int
    """Slots in blocks copied on write since the request arrived."""
    waste: float
    """Share of its allocated slots that hold no token, 0 to 1."""
    num_preemptions: int
    cached_tokens: dict[str, int]
    """Prompt tokens that were not computed, by the origin of their KV: device, host, disk."""
    miss: PrefixMiss | None
    """None if as much of the prompt was found as possible, or the cache was not asked."""
    tenant: str = ""


@dataclass(slots=True)
class AgeQuantiles:
    """Ages of blocks in seconds."""

    p50: float = 0.0
    p90: float = 0.0
    max: float = 0.0


@dataclass(slots=True)
class MemoryReport:
    """Contents of the KV pool, in total and per request. `print` shows it as a table, and so does a notebook."""

    stats: "EngineStats"
    waste: float
    """Share of all allocated slots that hold no token, 0 to 1."""
    used_block_ages: AgeQuantiles
    """Time since blocks in use were taken."""
    cached_free_block_ages: AgeQuantiles
    """Time since free blocks that the prefix cache can still find were taken."""
    requests: list[RequestMemory]
    """At most `MAX_REPORTED_REQUESTS`, running ones first."""
    groups: list[KVGroupMemory] = field(default_factory=list)
    """The KV groups; see `MemoryPlan.kv_groups` for their layers."""

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*self._summary(), *(line.rstrip() for line in table[: len(rows) if self.requests else 0])])

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        from html import escape  # only notebooks need it

        summary = "<br>".join(map(escape, self._summary()))
        head, *rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self._rows()]
        head = head.replace("td>", "th>")
        table = "".join(f"<tr>{row}</tr>" for row in (head, *rows)) if rows else ""
        return f"<p>{summary}</p><table>{table}</table>"

    def _summary(self) -> list[str]:
        stats = self.stats
        lines = [
            f"KV pool: {stats.num_used_blocks} of {stats.num_blocks} blocks of {stats.block_size} tokens used "
            f"({stats.kv_cache_usage:.1%}), {stats.num_pinned_blocks} pinned, "
            f"{stats.num_cached_free_blocks} free but still cached",
            f"slots: {stats.num_filled_slots} of {stats.num_allocated_slots} allocated hold a token "
            f"({self.waste:.1%} wasted), {stats.num_shared_slots} saved by sharing",
            f"requests: {stats.num_running} running, {stats.num_waiting} waiting",
        ]
        for number, group in enumerate(self.groups if len(self.groups) > 1 else ()):
            name = f"window of {group.window} tokens" if group.window else "full attention"
            cached = f"{group.num_cached_free_blocks} free and cached"
            lines.append(f"KV group {number}, {name}: {group.num_used_blocks} blocks used, {cached}")
        for name, tier in stats.tiers.items():
            lines.append(f"{name} tier: {tier.num_blocks} blocks, {tier.num_bytes / 2**20:.1f} MiB")
        if stats.states.num_slots:
            lines.append(
                f"recurrent states: {stats.states.num_running} of {stats.states.num_slots} slots of running sequences, "
                f"{stats.states.num_snapshots} snapshots, {stats.states.num_pinned} of them pinned"
            )
        return lines

    def _rows(self) -> list[list[str]]:
        """The head of the table, and a row for each request."""
        head = ["request", "state", "sequences", "tokens", "blocks", "shared slots", "waste", "cached", "preempted"]
        return [
            head,
            *(
                [
                    request.request_id,
                    "running" if request.running else "waiting",
                    str(request.num_sequences),
                    str(request.num_tokens),
                    str(request.num_blocks),
                    str(request.num_shared_slots),
                    f"{request.waste:.1%}",
                    str(sum(request.cached_tokens.values())),
                    str(request.num_preemptions),
                ]
                for request in self.requests
            ),
        ]


@dataclass(slots=True)
class EngineStats:
    """Snapshot of the engine after a step. Counts named `total_…` only grow."""

    num_running: int = 0
    """Requests that hold memory."""
    num_waiting: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    num_cached_free_blocks: int = 0
    """Free blocks that the prefix cache can still find."""
    num_pinned_blocks: int = 0
    """Blocks in use that registered prefixes hold."""
    block_size: int = 0
    num_filled_slots: int = 0
    """Token slots that hold KV; a shared slot counts once."""
    num_allocated_slots: int = 0
    num_shared_slots: int = 0
    """Slots saved by sharing: the sum over sequences minus the allocated slots."""
    total_steps: int = 0
    total_prompt_tokens: int = 0
    total_generated_tokens: int = 0
    total_preemptions: int = 0
    total_prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    total_prefix_hits: int = 0
    """Prompt tokens found there."""
    total_evictions: int = 0
    total_given_back: int = 0
    """Blocks that running sequences gave back because their window had passed."""
    total_block_copies: int = 0
    prefix_hits: dict[str, int] = field(default_factory=dict)
    """`total_prefix_hits` by where the KV was: device, host, disk."""
    prefix_misses: dict[str, int] = field(default_factory=dict)
    """Reasons of `PrefixMiss` → requests since the start."""
    num_grammars: int = 0
    """Compiled grammars in the cache."""
    num_grammar_bytes: int = 0
    """Their size when compiled."""
    total_drafts: int = 0
    """Drafts: consecutive draft tokens of one sequence in one step."""
    total_draft_tokens: int = 0
    total_accepted_tokens: int = 0
    """Draft tokens that were accepted."""
    predicted_output_tokens: int | None = None
    """Tokens that running and waiting requests will still generate. Like all predictions None while too few output
    lengths are known."""
    predicted_kv_cache_usage: float | None = None
    """Peak use by the running requests, as a share of the pool's blocks; above 1 if some will be preempted."""
    predicted_queue_seconds: float | None = None
    """Seconds until all requests that wait now have started."""
    tiers: dict[str, TierStats] = field(default_factory=dict)
    """Tiers below the pool by name: host, disk."""
    states: StateStats = field(default_factory=StateStats)
    """The slots of recurrent states; a model without recurrent layers has none."""

    @property
    def kv_cache_usage(self) -> float:
        """Share of the pool's blocks in use, 0 to 1."""
        return self.num_used_blocks / self.num_blocks if self.num_blocks else 0.0

    @property
    def waste(self) -> float:
        """Share of the allocated slots that hold no token: the paper's internal fragmentation, 0 to 1."""
        return 1 - self.num_filled_slots / self.num_allocated_slots if self.num_allocated_slots else 0.0
