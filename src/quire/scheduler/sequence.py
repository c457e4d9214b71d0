"""Sequence and SequenceGroup: the state of a request. Owned and written by the scheduler alone.

There are no phases. A sequence has tokens, and stored KV for the first `num_computed_tokens` of them. A step lets the
second number catch up with the first, whether the gap is a prompt, a chunk of one, the last sampled token, or
everything after a preemption.
"""

from quire.kv_cache.block_hash import BlockHash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.block_table import BlockTable
from quire.kv_cache.states import NO_STATE
from quire.outputs import PrefixMiss
from quire.request import BACKGROUND, Request, Task
from quire.scheduler.beam_search import BeamSearch
from quire.scheduler.draft_planner import SequenceDrafts
from quire.scheduler.length_curve import LengthClass, LengthCurve

NO_ROW = -1

_TO_THE_LIMIT = LengthCurve([])


class Sequence:
    """One sample of a request."""

    __slots__ = (
        "_num_computed_tokens",
        "drafts",
        "group",
        "in_decode_batch",
        "index",
        "row",
        "sample",
        "state",
        "table",
        "token_ids",
        "was_reported",
    )

    def __init__(self, group: "SequenceGroup", index: int, table: BlockTable, token_ids: list[int]) -> None:
        self.group = group
        self.index = index
        self.sample = (group.request.request_id, index)
        """Its name outside the scheduler: (request id, index)."""
        self.was_reported = False
        """Whether a delta of it was delivered since it last started to run."""
        self.table = table
        self.token_ids = token_ids
        """Prompt and output. A last entry of ~row stands for a token that is not known yet (`LookAhead`)."""
        self._num_computed_tokens = 0
        self.row = NO_ROW
        self.state = NO_STATE
        """Slot of its recurrent state, in models that have one."""
        self.drafts: SequenceDrafts | None = None
        """Set while it runs and speculation is on."""
        self.in_decode_batch = False
        """Whether it is in the `DecodeBatch`. Then `table.num_tokens` may lag behind, by less than a block."""

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV is stored, counting steps in flight only where a later step was planned on them."""
        # In steady decode only the last token is not computed, so nothing has to be counted.
        return len(self.token_ids) - 1 if self.in_decode_batch else self._num_computed_tokens

    def advance(self, num_computed_tokens: int) -> None:
        """A step computed tokens up to this number."""
        self._num_computed_tokens = num_computed_tokens

    def start_from_table(self) -> None:
        """The table was filled with blocks whose KV is stored, or will be before the sequence is in a plan."""
        self._num_computed_tokens = self.table.num_tokens

    def discard_computed(self) -> None:
        """Nothing is stored any more, or must not be used again."""
        self._num_computed_tokens = 0

    def drop_unknown_token(self) -> None:
        """Remove the number that `LookAhead` put in place of a token, where it did."""
        if self.token_ids[-1] < 0:
            self.token_ids.pop()

    def leave_decode_batch(self) -> None:
        """Count computed tokens again."""
        self._num_computed_tokens = len(self.token_ids) - 1
        self.in_decode_batch = False

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.group.num_prompt_tokens

    @property
    def num_missing_tokens(self) -> int:
        """Tokens whose KV is still to be computed."""
        return len(self.token_ids) - self.num_computed_tokens


class SequenceGroup:
    """A request's unfinished sequences, scheduled and preempted together (paper, section 4.5).

    The first sequence leads: it computes the prompt, and the others fork from its table where the prompt ends. The same
    holds when the group resumes after a preemption, so the prompt is stored once then, too; after the prompt each
    sequence starts from the cached part of its own output. Sequences without output come first: they all sample their
    first token where the leader ends the prompt.

    A beam search begins with one sequence, and `idle_beams` for the others. Its live beams are `sequences`, the best
    first. Every beam, live or idle, holds a row from admission on, so that a fork never lacks one.
    """

    __slots__ = (
        "awaited",
        "beam_search",
        "cached_tokens",
        "first_scheduled_time",
        "idle_beams",
        "length_classes",
        "max_num_tokens",
        "miss",
        "num_accepted_tokens",
        "num_cached_tokens",
        "num_copied_blocks",
        "num_draft_tokens",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "num_shared_blocks",
        "only_decodes",
        "order",
        "rank",
        "request",
        "sequences",
        "stop_ids",
        "wants_vector",
    )

    def __init__(self, request: Request, pool: BlockPool, root: BlockHash, arrival_number: int) -> None:
        self.request = request
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_num_tokens = self.num_prompt_tokens + request.max_tokens
        """Tokens of one sequence at most, prompt included."""
        self.stop_ids = frozenset((*request.eos_token_ids, *request.params.stop_token_ids))
        """Tokens that end a sequence."""
        params = request.params
        self.wants_vector = request.task is Task.EMBED
        """Whether it ends with its prompt, whose vector it gets; no token is sampled."""
        self.only_decodes = params.beam_width is None and params.structured_outputs is None and params.logprobs is None
        """Whether a step of its sequences yields nothing but one token each: no beams, grammar or log-probabilities."""
        self.order = (request.priority, arrival_number)
        """Preemption order: the greatest is preempted first. Unique, so that every order in the scheduler is total."""
        self.rank: tuple[int, float, int] = (request.priority, 0.0, arrival_number)
        """Admission order: the lowest is admitted first. Unique; set by the waiting queue when the group enters it."""
        self.length_classes: tuple[LengthClass, ...] = ()
        """Classes of requests whose answers predict the length of its own, the closest first."""
        self.num_shared_blocks = 0
        """Blocks that others held when it started from them: they stay in use when it ends."""
        self.num_preemptions = 0
        self.num_copied_blocks = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.num_cached_tokens = -1
        """Prompt tokens found in the prefix cache at the first admission; −1 before that."""
        self.first_scheduled_time = 0.0
        self.num_prompt_logprobs = 0
        """Prompt positions whose log-probabilities were delivered."""
        self.awaited: tuple[int, BlockHash] | None = None
        """(index, hash) of the first block that it lacks, while it waits for another group to compute it."""
        self.cached_tokens: dict[str, int] = {}
        """Prompt tokens found at the first admission, by where their KV was: device, host, disk."""
        self.miss: PrefixMiss | None = None
        """Why the rest of the prompt was not found."""
        self.beam_search: BeamSearch | None = None
        self.idle_beams: list[Sequence] = []
        """Sequences without tokens or blocks that can become beams."""
        outputs = request.output_token_ids or {index: [] for index in range(request.params.n)}
        if request.params.beam_width is not None:
            # A search delivers nothing before its end, so a resumed request starts over.
            self.beam_search = BeamSearch(request)
            self.idle_beams = [
                Sequence(self, index, BlockTable(pool, root, request.inputs), [])
                for index in range(1, self.beam_search.width)
            ]
            outputs = {0: []}
        self.sequences = [
            Sequence(self, index, BlockTable(pool, root, request.inputs), [*request.prompt_token_ids, *output])
            for index, output in outputs.items()
        ]
        self.sequences.sort(key=lambda sequence: sequence.num_output_tokens > 0)

    @property
    def leader(self) -> Sequence:
        return self.sequences[0]

    @property
    def is_background(self) -> bool:
        return self.request.priority >= BACKGROUND

    @property
    def awaits_first_token(self) -> bool:
        """Whether a client waits for the first token, or the vector, of its request."""
        return not (self.is_background or self.leader.num_output_tokens)

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are wanted and not all delivered."""
        wanted = self.request.params.prompt_logprobs is not None
        return wanted and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    @property
    def length_curve(self) -> LengthCurve | None:
        """The expected distribution of its answers' lengths; None while too little is known.

        Beams are expected to run to their limit. The limit of a vector is no token.
        """
        if self.beam_search is not None or self.wants_vector:
            return _TO_THE_LIMIT
        for length_class in self.length_classes:
            curve = length_class.curve
            if curve is not None:
                return curve
        return None

    @property
    def max_results(self) -> int:
        """Results of one sample at most: output tokens, or the one vector."""
        return 1 if self.wants_vector else self.request.max_tokens

    @property
    def num_rows(self) -> int:
        """Rows that the group holds while it runs."""
        return len(self.sequences) + len(self.idle_beams)

    @property
    def advances_together(self) -> bool:
        """Whether the sequences are beams, which all take their next token in the same step."""
        return self.beam_search is not None

    @property
    def takes_drafts(self) -> bool:
        """False for beams, whose next tokens are not sampled, and for requests with per-token logits processors."""
        return self.beam_search is None and not self.request.params.logits_processors

    def waits_for_leader(self, sequence: Sequence) -> bool:
        """Whether the sequence has no KV yet and will fork from the leader, which still computes the prompt."""
        leader = self.sequences[0]
        in_prompt = leader.num_computed_tokens < self.num_prompt_tokens
        return in_prompt and sequence.num_computed_tokens == 0 and sequence is not leader

    def looks_for_blocks(self, sequence: Sequence) -> bool:
        """True if the sequence was preempted and its cached blocks have not been looked up yet."""
        if sequence.num_computed_tokens or not sequence.num_output_tokens or self.waits_for_leader(sequence):
            return False
        return sequence is not self.sequences[0] or not self.lacks_prompt_logprobs

    def max_blocks(self, pool: BlockPool) -> int:
        """The most blocks that the group needs at once: the prompt's full blocks once, the rest per sample. In a window
        group each sample needs the blocks that a token sees."""
        shared = self.num_prompt_tokens // pool.block_size
        # The last sampled token is never computed, so it needs no slot; a vector has none.
        num_tokens = self.num_prompt_tokens + self.max_results - 1
        longest = -(-num_tokens // pool.block_size)
        all_positions = shared + self.num_rows * (longest - shared)
        return sum(min(all_positions, self.num_rows * seen) for seen in pool.most_blocks_by_group(num_tokens))
