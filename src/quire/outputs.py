"""What a user receives: RequestOutput with one CompletionOutput per sample. Names are vLLM's."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from quire.step import TokenLogprobs


@dataclass(slots=True)
class Logprob:
    """One token's log-probability, its 1-based rank in the vocabulary, and its text where a tokenizer is at hand."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""Token id → Logprob for one position; the token that stands there comes first."""


@dataclass(slots=True)
class CompletionOutput:
    """One sample: all of it from `LLM`, what is new since the last item in a stream of `AsyncLLM`."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    """"stop", "length", "abort" or "error"; None while it runs."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None for end of sequence."""
    error: str | None = None
    """What went wrong, where `finish_reason` is "error"."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def extend(self, delta: "CompletionOutput") -> None:
        """Append what a later item of the stream brought."""
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
    """Seconds on the engine's monotonic clock, and counts."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    """Guessed and computed before it was known whether they come."""
    num_accepted_tokens: int = 0
    """Those of them that came."""


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

    def extend(self, delta: "RequestOutput") -> None:
        """Append a later item of the same stream: deltas add up to the whole."""
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
        self.metrics = delta.metrics


@dataclass(frozen=True, slots=True)
class RegisteredPrefix:
    """A prefix that stays: what `LLM.register_prefix` returns and `unregister_prefix` takes."""

    prefix_id: str
    num_tokens: int
    num_kept_tokens: int
    """Those of its full blocks; what follows them is computed with each request."""


@dataclass(slots=True)
class BeamSearchSequence:
    """One finished beam."""

    tokens: list[int]
    """The prompt's and those that follow."""
    text: str
    """Of all of them; empty where the model has no tokenizer."""
    cum_logprob: float
    """Log-probability of the tokens that follow."""
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: list[PositionLogprobs] | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """What has become of a request so far, beside its tokens."""

    first_scheduled_time: float
    num_cached_tokens: int
    num_preemptions: int
    num_draft_tokens: int
    num_accepted_tokens: int


@dataclass(slots=True)
class SequenceDelta:
    """What one step added to one sample, as it leaves the engine core: ids, no text yet."""

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    ends_with_text: bool = False
    """The finish reason is stop and the last token is part of the text: it made its grammar complete."""
    error: str | None = None
    cumulative_logprob: float | None = None
    """Of a whole hypothesis of a beam search; its tokens come in one piece."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Entries for prompt tokens after the first, as far as this step computed them."""
    counts: RequestCounts | None = None
    """None: hardly others than those that were told before."""


SampleId = tuple[str, int]
"""(request id, index)."""


@dataclass(slots=True)
class StepDeltas:
    """What one step added to all samples. Most decode, and gain one token of which there is nothing to say: those have
    no object each, since of hundreds that would cost more than all else that the host does in a step."""

    samples: list[SampleId] = field(default_factory=list)
    """Those that gained a token and nothing else: the very list of the step before where they are the same, and never
    changed once it was given out, so that whoever knows the list need not read it."""
    token_ids: list[int] = field(default_factory=list)
    """Its token."""
    batch_id: int = 0
    """Non-zero: `samples` equals that of the last deltas with the same id (see `StepPlan.batch_id`)."""
    others: list[SequenceDelta] = field(default_factory=list)
    """Those of which there is more to say: the first of a sample since it runs, the last, log-probabilities, …"""

    def __len__(self) -> int:
        return len(self.samples) + len(self.others)

    def __iter__(self) -> Iterator[SequenceDelta]:
        """All of them, each spelt out."""
        yield from self.others
        for (request_id, index), token_id in zip(self.samples, self.token_ids, strict=True):
            yield SequenceDelta(request_id, index, [token_id])


@dataclass(slots=True)
class TierStats:
    """One tier below the pool. Blocks, unless said otherwise."""

    num_blocks: int = 0
    num_bytes: int = 0
    capacity_bytes: int = 0
    stopped: bool = False
    """Takes no more blocks, because writing failed; those it has are still found."""
    total_hits: int = 0
    """Tokens that did not have to be computed, since they were loaded from here: of prompts, and of what resumed."""
    total_saved: int = 0
    total_loaded: int = 0
    total_saved_bytes: int = 0
    total_loaded_bytes: int = 0
    total_dropped: int = 0
    """Not saved, because too many others were on their way or writing failed."""
    total_evicted: int = 0
    """Forgotten to make room."""
    total_corrupt: int = 0
    """Found truncated, altered or unreadable."""
    total_recomputed: int = 0
    """Computed although they were stored here, since that was faster by the measured rates."""


class PrefixMiss(NamedTuple):
    """Where a prompt left what the prefix cache holds, and why."""

    block: int
    """The first logical block that had to be computed."""
    reason: str
    """new: nothing begins like this; differs: others go on differently from here; evicted: it was here; salt: it may
    be here, but for another tenant."""
    evicted_seconds_ago: float | None


@dataclass(slots=True)
class RequestMemory:
    """What one unfinished request holds. Slots are tokens' worth of KV."""

    request_id: str
    running: bool
    num_sequences: int
    num_tokens: int
    """Prompt and output of all its sequences, each sharer's counted."""
    num_blocks: int
    """Distinct blocks."""
    num_filled_slots: int
    num_allocated_slots: int
    num_shared_slots: int
    """What its sequences save by sharing, among themselves and with other requests."""
    num_copied_slots: int
    """In blocks copied on write since it came."""
    waste: float
    """Share of its allocated slots that hold no token, 0 to 1."""
    num_preemptions: int
    cached_tokens: dict[str, int]
    """Prompt tokens that were not computed, by where their KV came from: device, host, disk."""
    miss: PrefixMiss | None
    """None where all of the prompt was found that can be, or nothing was looked for."""


@dataclass(slots=True)
class AgeQuantiles:
    """Seconds."""

    p50: float = 0.0
    p90: float = 0.0
    max: float = 0.0


@dataclass(slots=True)
class MemoryReport:
    """What the pool holds, in all and per request."""

    stats: "EngineStats"
    waste: float
    """Share of all allocated slots that hold no token, 0 to 1."""
    used_block_ages: AgeQuantiles
    """Since a block in use was taken."""
    cached_free_block_ages: AgeQuantiles
    """Since a free block whose content can still be found was taken."""
    requests: list[RequestMemory]
    """At most `MAX_REPORTED_REQUESTS`, those that run first."""


@dataclass(slots=True)
class EngineStats:
    """A snapshot of the engine after a step. Counts whose name starts with `total_` only grow."""

    num_running: int = 0
    """Requests with memory."""
    num_waiting: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    num_cached_free_blocks: int = 0
    """Free blocks whose content can still be found by the prefix cache."""
    num_pinned_blocks: int = 0
    """Blocks in use that registered prefixes hold."""
    block_size: int = 0
    num_filled_slots: int = 0
    """Token slots holding KV, each sharer counted once per physical slot."""
    num_allocated_slots: int = 0
    num_shared_slots: int = 0
    """Slots that sharing saved: what sequences hold together less what is allocated."""
    total_steps: int = 0
    total_prompt_tokens: int = 0
    total_generated_tokens: int = 0
    total_preemptions: int = 0
    total_prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    total_prefix_hits: int = 0
    """Prompt tokens found there."""
    total_evictions: int = 0
    total_block_copies: int = 0
    prefix_hits: dict[str, int] = field(default_factory=dict)
    """`total_prefix_hits` by where the KV was: device, host, disk."""
    prefix_misses: dict[str, int] = field(default_factory=dict)
    """Reasons of `PrefixMiss` → requests since the start."""
    num_grammars: int = 0
    """Compiled grammars that are kept, and the bytes they took when compiled."""
    num_grammar_bytes: int = 0
    total_drafts: int = 0
    """Runs of drafted tokens, one sequence's in one step."""
    total_draft_tokens: int = 0
    total_accepted_tokens: int = 0
    """Draft tokens that turned out to be what came next."""
    predicted_output_tokens: int | None = None
    """Tokens that running and waiting requests will still generate; like all predictions None while too little is known
    of how long answers are."""
    predicted_kv_cache_usage: float | None = None
    """The most that running requests will use, as a share of the pool's blocks; more than 1 where some will be
    preempted."""
    predicted_queue_seconds: float | None = None
    """Until all requests that wait now have started."""
    tiers: dict[str, TierStats] = field(default_factory=dict)
    """Of each tier below the pool, by name: host, disk."""

    @property
    def kv_cache_usage(self) -> float:
        """Share of the pool's blocks in use, 0 to 1."""
        return self.num_used_blocks / self.num_blocks if self.num_blocks else 0.0

    @property
    def waste(self) -> float:
        """Share of the allocated slots that hold no token: the paper's internal fragmentation, 0 to 1."""
        return 1 - self.num_filled_slots / self.num_allocated_slots if self.num_allocated_slots else 0.0
