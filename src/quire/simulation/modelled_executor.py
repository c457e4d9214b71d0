"""ModelledExecutor: takes the place of the runner. It executes a StepPlan without a model and says how long that takes.

Beams. The probabilities of the next token are modelled by breaking a stick: the likeliest token gets a share between 0
and 1 of the probability, at random and evenly, the next one such a share of the rest, and so on. Their entropy is 1 nat
on average, about what a large language model has on text. Each beam's candidates are independent of the others'.

Tiers. Copies to and from host memory are part of the step, as in the engine; the disk reads and writes in the
background, one block after the other.

Lengths. No model says when an answer is complete, so the simulation does: it keeps a table of the requests that end
before their limit, by their seeds, which no two share.
"""

import math
import random
from collections import deque
from operator import mul

from quire.kv_cache.tiers import DISK, HOST
from quire.scheduler.decode_batch import PlainSteps
from quire.simulation.step_time import StepTime
from quire.step import BeamCandidates, OffloadPlan, OffloadResult, StepPlan, StepResult

SAMPLED_TOKEN = 2**30
"""The token that the first sample of every request generates; the next sample generates the next token id.

No prompt holds it, so no prompt continues another request's output.
"""
END_TOKEN = 0
"""The last token of a sample that ends before its limit."""


class ModelledTiers:
    """Times of block copies between tiers, for blocks of `block_bytes` bytes; rates in bytes per second."""

    def __init__(self, block_bytes: int, *, host_rate: float, disk_rate: float) -> None:
        self._host_seconds = block_bytes / host_rate
        self._disk_seconds = block_bytes / disk_rate
        self._reads: deque[tuple[float, bytes, float]] = deque()
        """(when the read ends, block hash, seconds it takes), the first to end first."""
        self._writes: deque[tuple[float, bytes]] = deque()
        """(when the write ends, block hash), the first to end first."""

    def copy(self, plan: OffloadPlan | None, now: float, seconds: float) -> tuple[OffloadResult, float]:
        """Copies that end within a step which begins at `now` and computes for `seconds`; and the seconds of that step
        with its copies."""
        result = OffloadResult()
        wait = False
        if plan is not None:
            num_loads = sum(tier == HOST for tier, _, _ in plan.loads)
            num_stores = sum(tier == HOST for tier, _, _ in plan.stores)
            result.load_seconds = num_loads * self._host_seconds
            seconds += (num_loads + num_stores) * self._host_seconds
            for block_hash in plan.reads:
                begin = max(now, self._reads[-1][0]) if self._reads else now
                self._reads.append((begin + self._disk_seconds, block_hash, self._disk_seconds))
            for tier, block_hash, _ in plan.stores:
                if tier == DISK:
                    begin = max(now, self._writes[-1][0]) if self._writes else now
                    self._writes.append((begin + self._disk_seconds, block_hash))
            wait = plan.wait
        if wait and self._reads:
            seconds = max(seconds, self._reads[0][0] - now)
        end = now + seconds
        while self._reads and self._reads[0][0] <= end:
            _, block_hash, took = self._reads.popleft()
            result.read.append((block_hash, took))
        while self._writes and self._writes[0][0] <= end:
            result.stored.append(self._writes.popleft()[1])
        return result, seconds

    def clear(self) -> None:
        """Lose all copies on their way."""
        self._reads.clear()
        self._writes.clear()


class ModelledExecutor:
    """The results of steps, and their times by a `StepTime`."""

    def __init__(self, step_time: StepTime, *, seed: int = 0, tiers: ModelledTiers | None = None) -> None:
        """`seed` seeds the candidates of beams."""
        self.output_lengths: dict[int, int] = {}
        """Seed of a request that ends by itself → tokens of each of its samples. The simulation that sends the
        requests keeps it."""
        self._step_time = step_time
        self._tiers = tiers
        self._random = random.Random(f"beams {seed}")
        self._beam_widths: dict[int, int] = {}
        """Row of a beam → width of its search."""
        self._num_left: dict[int, int] = {}
        """Row that ends by itself → tokens it has still to generate."""
        self._sampled: dict[int, int] = {}
        """Row → token it generates, if that is not `SAMPLED_TOKEN`."""

    def execute(self, plan: StepPlan, now: float = 0.0) -> tuple[StepResult, float]:
        """The result that a runner would return for a step beginning at `now`, and the seconds it would take."""
        num_samples = len(plan.sample_rows)
        num_rows, num_tokens = len(plan.rows), len(plan.token_ids)
        context = sum(plan.num_computed_tokens) + num_tokens
        if num_tokens == num_rows:
            num_pairs: float = context
        else:
            # Token i of c after s earlier ones attends to s + i + 1 keys: c s + c (c + 1) / 2 for all of them.
            counts = plan.num_scheduled_tokens
            num_pairs = (
                sum(map(mul, plan.num_computed_tokens, counts)) + (sum(map(mul, counts, counts)) + num_tokens) / 2
            )
        seconds = self._step_time.seconds(num_rows, num_tokens, context, num_pairs, num_samples) if num_rows else 0.0
        nothing: list[None] = [None] * num_samples
        result = StepResult([SAMPLED_TOKEN] * num_samples, [*nothing], [*nothing])
        for new in plan.new_rows:
            if new.sample_index:
                self._sampled[new.row] = SAMPLED_TOKEN + new.sample_index
            elif self._sampled:
                self._sampled.pop(new.row, None)
            length = self.output_lengths.get(new.seed)
            if length is not None:
                self._num_left[new.row] = length - len(new.output_token_ids)
            elif self._num_left:
                self._num_left.pop(new.row, None)
        if self._sampled:
            # Samples with equal tokens would find each other's blocks in the prefix cache.
            result.token_ids = [self._sampled.get(row, SAMPLED_TOKEN) for row in plan.sample_rows]
        if self._num_left:
            self._end_samples(plan, result)
        self._follow_beams(plan, result)
        result.vectors = dict.fromkeys(plan.pool_rows, b"")
        if self._tiers is not None:
            result.offload, seconds = self._tiers.copy(plan.offload, now, seconds)
        return result, seconds

    def times_of(self, steps: PlainSteps, now: float) -> list[float]:
        """`now`, at which plain steps begin, and when each of them ends."""
        num_rows, context, times = len(steps.sequences), steps.num_context_tokens, [now]
        for _ in range(steps.num_steps):
            now += self._step_time.seconds(num_rows, num_rows, context, context, num_rows)
            times.append(now)
            context += num_rows
        return times

    def clear(self) -> None:
        """The engine died: forget its rows and lose all copies on their way."""
        self._beam_widths.clear()
        self._sampled.clear()
        self._num_left.clear()
        if self._tiers is not None:
            self._tiers.clear()

    def _end_samples(self, plan: StepPlan, result: StepResult) -> None:
        num_left = self._num_left
        for place, row in enumerate(plan.sample_rows):
            if row in num_left:
                num_left[row] = left = num_left[row] - 1
                if not left:
                    result.token_ids[place] = END_TOKEN

    def _follow_beams(self, plan: StepPlan, result: StepResult) -> None:
        widths = self._beam_widths
        for fork in plan.row_forks:
            widths[fork.row] = widths[fork.source]
        for new in plan.new_rows:
            if new.params.beam_width is not None:
                widths[new.row] = new.params.beam_width
            elif widths:
                widths.pop(new.row, None)
        if widths:
            for place, row in enumerate(plan.sample_rows):
                if row in widths:
                    result.candidates[place] = self._candidates(widths[row])

    def _candidates(self, width: int) -> BeamCandidates:
        rest, shares = 1.0, []
        for _ in range(width):
            share = rest * (1.0 - self._random.random())
            shares.append(share)
            rest = max(rest - share, 1e-300)
        shares.sort(reverse=True)
        return BeamCandidates(list(range(1, width + 1)), [math.log(share) for share in shares], [])
