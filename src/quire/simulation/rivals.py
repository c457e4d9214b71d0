"""Policies to compare the engine's with: an oracle that knows all output lengths, and SGLang's rule of admission."""

from collections.abc import Mapping, Sequence

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.forecast import Forecast
from quire.scheduler.policies import ADMISSIONS, SCHEDULING_POLICIES, MakeQueue, MakeRule
from quire.scheduler.sequence import SequenceGroup
from quire.scheduler.service import OUTPUT_TOKEN, PROMPT_TOKEN, Progress
from quire.scheduler.waiting_queue import WaitingQueue


class OracleShortestFirst(WaitingQueue):
    """Shortest job first by the true lengths, with no bound on how long a long one waits."""

    def __init__(self, output_lengths: Mapping[int, int]) -> None:
        """`output_lengths`: seed of a request that ends by itself → tokens of each sample."""
        super().__init__()
        self._output_lengths = output_lengths

    def enter(self, group: SequenceGroup) -> None:
        priority, arrival_number = group.order
        length = self._output_lengths.get(group.request.seed, group.request.max_tokens)
        output = length * len(group.sequences)
        size = PROMPT_TOKEN * group.num_prompt_tokens + OUTPUT_TOKEN * output
        group.rank = (priority, size, arrival_number)
        self.push(group)


class NewTokenRatio:
    """SGLang's rule of admission, after its published behaviour; preemption is Quire's.

    A new request must fit with its whole token limit (at most `CLIP`) beside the running requests. Each running request
    is expected to need a share of its own limit. This share, the ratio, falls from `FIRST` to `LEAST` over
    `DECAY_STEPS` steps. A preemption sets it to the share of their limits that the running requests will have used
    `LOOK_AHEAD` tokens from now.
    """

    FIRST = 0.7
    LEAST = 0.7 * 0.14
    DECAY_STEPS = 600
    CLIP = 4096
    LOOK_AHEAD = 20

    def __init__(self, forecast: Forecast, pool: BlockPool, progress: Progress) -> None:
        self.ratio = self.FIRST
        self._pool = pool
        self._progress = progress
        self._step = 0
        self._preempted = False

    def fits(self, group: SequenceGroup, num_needed: int, running: Sequence[SequenceGroup], promised: int) -> bool:
        self._renew(running)
        reserved = 0.0
        for other in running:
            limit = other.request.max_tokens
            for sequence in other.sequences:
                reserved += min(self.CLIP, max(0, limit - sequence.num_output_tokens)) * self.ratio
        mine = num_needed * self._pool.block_size + len(group.sequences) * min(self.CLIP, group.request.max_tokens)
        return mine + reserved <= (self._pool.num_free - promised) * self._pool.block_size

    def _renew(self, running: Sequence[SequenceGroup]) -> None:
        num_steps, self._step = self._progress.total_steps - self._step, self._progress.total_steps
        if self._preempted:
            sequences = [(sequence, other.request.max_tokens) for other in running for sequence in other.sequences]
            used = sum(sequence.num_output_tokens + self.LOOK_AHEAD for sequence, _ in sequences)
            self.ratio = min(1.0, used / (1 + sum(limit for _, limit in sequences)))
            self._preempted = False
        else:
            self.ratio = max(self.LEAST, self.ratio - num_steps * (self.FIRST - self.LEAST) / self.DECAY_STEPS)

    def note_preemption(self) -> None:
        self._preempted = True

    def note_end(self) -> None:
        """Nothing to do: the ratio falls with the steps."""


def make_queues(output_lengths: Mapping[int, int]) -> dict[str, MakeQueue]:
    """Every scheduling policy of a simulation; the oracle looks lengths up in `output_lengths`."""
    return {**SCHEDULING_POLICIES, "oracle-shortest": lambda progress: OracleShortestFirst(output_lengths)}


RULES: dict[str, MakeRule] = {**ADMISSIONS, "new-token-ratio": NewTokenRatio}
