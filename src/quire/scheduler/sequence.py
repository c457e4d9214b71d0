"""Sequence and SequenceGroup: what has become of a request so far. Owned and written by the scheduler alone.

There are no phases. A sequence has tokens, and KV stored for the first `num_computed_tokens` of them; a step lets
the second number catch up with the first, whether the gap is a prompt, a chunk of one, the last sampled token, or
everything again after a preemption.
"""

from quire.kv_cache.block_hash import BlockHash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.block_table import BlockTable
from quire.outputs import PrefixMiss
from quire.request import Request
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
        "table",
        "token_ids",
        "was_reported",
    )

    def __init__(self, group: "SequenceGroup", index: int, table: BlockTable, token_ids: list[int]) -> None:
        self.group = group
        self.index = index
        self.sample = (group.request.request_id, index)
        """What it is called outside."""
        self.was_reported = False
        """Whether anything was delivered of it since it runs."""
        self.table = table
        self.token_ids = token_ids
        """Prompt and output."""
        self._num_computed_tokens = 0
        self.row = NO_ROW
        self.drafts: SequenceDrafts | None = None
        """While it runs and speculation is on."""
        self.in_decode_batch = False
        """Whether `DecodeBatch` has it: then `table.num_tokens` may lag behind, by less than a block."""

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV is stored, counting steps in flight only where a later step was planned on them."""
        # In steady decode just the last token is not computed: nobody keeps count.
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

    The first of them leads: it computes the prompt, and the others fork from its table where the prompt ends. The
    same holds when the group resumes after a preemption, so that the prompt is stored once then, too; past it each
    starts from what is found of its own output. Sequences without output come first: they all get their first token
    where the leader ends the prompt.

    A beam search begins with one sequence and `idle_beams` for the others: its live beams are `sequences`, the best
    first, and each holds a row from admission on, so that a fork is never short of one.
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
    )

    def __init__(self, request: Request, pool: BlockPool, root: BlockHash, arrival_number: int) -> None:
        self.request = request
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_num_tokens = self.num_prompt_tokens + request.max_tokens
        """Of one sequence, its prompt's included."""
        self.stop_ids = frozenset((*request.eos_token_ids, *request.params.stop_token_ids))
        """Tokens that end a sequence."""
        params = request.params
        self.only_decodes = params.beam_width is None and params.structured_outputs is None and params.logprobs is None
        """Whether of a step of its sequences' there is nothing to know but a token of each."""
        self.order = (request.priority, arrival_number)
        """Who yields last; unique, so that every order in the scheduler is total."""
        self.rank: tuple[int, float, int] = (request.priority, 0.0, arrival_number)
        """Who is admitted first; unique, and set by the waiting queue when the group enters it."""
        self.length_classes: tuple[LengthClass, ...] = ()
        """By whose answers its own are predicted, the closest first."""
        self.num_shared_blocks = 0
        """Blocks that it started from while others held them: they stay when it ends."""
        self.num_preemptions = 0
        self.num_copied_blocks = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.num_cached_tokens = -1
        """Prompt tokens found in the prefix cache at the first admission; −1 before it."""
        self.first_scheduled_time = 0.0
        self.num_prompt_logprobs = 0
        """Prompt positions whose log-probabilities were delivered."""
        self.awaited: tuple[int, BlockHash] | None = None
        """The first block the group would have to compute (index and name), while it waits for another one to do so."""
        self.cached_tokens: dict[str, int] = {}
        """Prompt tokens that needed no computing at the first admission, by where their KV was: device, host, disk."""
        self.miss: PrefixMiss | None = None
        """What kept the rest of the prompt from being found."""
        self.beam_search: BeamSearch | None = None
        self.idle_beams: list[Sequence] = []
        """Sequences without tokens or blocks that wait to become beams."""
        outputs = request.output_token_ids or {index: [] for index in range(request.params.n)}
        if request.params.beam_width is not None:
            # Nothing of a search is delivered before its end, so a resumed request starts over.
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
    def lacks_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens were asked for and are not all delivered."""
        wanted = self.request.params.prompt_logprobs is not None
        return wanted and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    @property
    def length_curve(self) -> LengthCurve | None:
        """The distribution of lengths to judge its answers by; None while too little is known.

        Beams are expected to go on to their limit.
        """
        if self.beam_search is not None:
            return _TO_THE_LIMIT
        for length_class in self.length_classes:
            curve = length_class.curve
            if curve is not None:
                return curve
        return None

    @property
    def num_rows(self) -> int:
        """Rows the group holds while it runs."""
        return len(self.sequences) + len(self.idle_beams)

    @property
    def advances_together(self) -> bool:
        """Whether the sequences are beams, which take their next tokens in the same step or not at all."""
        return self.beam_search is not None

    @property
    def takes_drafts(self) -> bool:
        """Beams take no drafts: what follows one is not drawn. Nor does who is to be called once for every token."""
        return self.beam_search is None and not self.request.params.logits_processors

    def waits_for_leader(self, sequence: Sequence) -> bool:
        """Whether the sequence has no KV yet and will fork from the leader, which is still at the prompt."""
        leader = self.sequences[0]
        is_behind = leader.num_computed_tokens < self.num_prompt_tokens
        return is_behind and sequence.num_computed_tokens == 0 and sequence is not leader

    def looks_for_blocks(self, sequence: Sequence) -> bool:
        """Whether the sequence resumes and has not started from what is found of it yet."""
        if sequence.num_computed_tokens or not sequence.num_output_tokens or self.waits_for_leader(sequence):
            return False
        return sequence is not self.sequences[0] or not self.lacks_prompt_logprobs

    def max_blocks(self, block_size: int) -> int:
        """The most blocks the group can ever hold: the full ones of the prompt once, the rest per sample."""
        shared = self.num_prompt_tokens // block_size
        # The last token sampled is never computed, so it needs no slot.
        longest = -(-(self.num_prompt_tokens + self.request.max_tokens - 1) // block_size)
        return shared + self.num_rows * (longest - shared)
