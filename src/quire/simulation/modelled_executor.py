"""ModelledExecutor: takes the place of the runner. Executes a StepPlan without a model, and says how long it took.

Beams. What a model says of the next token is modelled by breaking a stick: the likeliest token gets a share of the
probability drawn evenly from 0 to 1, the next one such a share of the rest, and so on. The entropy of that is 1 nat
on average, about what a large language model has on text. One beam's candidates are drawn apart from another's.

Tiers. Copies to and from host memory are part of the step, as in the engine; the disk reads and writes in the
background, one block after the other.
"""

import math
import random
from collections import deque
from operator import mul

from quire.kv_cache.tiers import DISK, HOST
from quire.sampling_params import SamplingParams
from quire.simulation.step_time import StepTime
from quire.step import BeamCandidates, OffloadPlan, OffloadResult, StepPlan, StepResult

SAMPLED_TOKEN = 2**30
"""What the first sample of every request draws, the next sample the next token; a sequence ends by its length.

No prompt holds it, so that none goes on where an output ended.
"""


END_TOKEN = 0
"""What a sample draws last that ends before its limit."""
_LENGTH = "output_tokens"


def ends_after(num_tokens: int) -> dict[str, str]:
    """What `SamplingParams.extra` says of samples that end by themselves: after so many tokens, the last included."""
    return {_LENGTH: str(num_tokens)}


def output_length(params: SamplingParams) -> int | None:
    """After how many tokens samples end by themselves; None if they go on to their limit."""
    length = params.extra.get(_LENGTH)
    return None if length is None else int(length)


class ModelledTiers:
    """Where moved blocks of `block_bytes` are, and when they get there; rates in bytes per second."""

    def __init__(self, block_bytes: int, *, host_rate: float, disk_rate: float) -> None:
        self._host_seconds = block_bytes / host_rate
        self._disk_seconds = block_bytes / disk_rate
        self._reads: deque[tuple[float, bytes, float]] = deque()
        """(when it ends, name, seconds it takes) in that order."""
        self._writes: deque[tuple[float, bytes]] = deque()

    def move(self, moves: OffloadPlan | None, now: float, seconds: float) -> tuple[OffloadResult, float]:
        """What ends by the end of a step that begins `now` and computes for `seconds`; and how long it then takes."""
        moved = OffloadResult()
        wait = False
        if moves is not None:
            num_loads = sum(tier == HOST for tier, _, _ in moves.loads)
            num_saves = sum(tier == HOST for tier, _, _ in moves.saves)
            moved.load_seconds = num_loads * self._host_seconds
            seconds += (num_loads + num_saves) * self._host_seconds
            for name in moves.reads:
                begin = max(now, self._reads[-1][0]) if self._reads else now
                self._reads.append((begin + self._disk_seconds, name, self._disk_seconds))
            for tier, name, _ in moves.saves:
                if tier == DISK:
                    begin = max(now, self._writes[-1][0]) if self._writes else now
                    self._writes.append((begin + self._disk_seconds, name))
            wait = moves.wait
        if wait and self._reads:
            seconds = max(seconds, self._reads[0][0] - now)
        end = now + seconds
        while self._reads and self._reads[0][0] <= end:
            _, name, took = self._reads.popleft()
            moved.read.append((name, took))
        while self._writes and self._writes[0][0] <= end:
            moved.saved.append(self._writes.popleft()[1])
        return moved, seconds

    def forget(self) -> None:
        """What is on its way is lost."""
        self._reads.clear()
        self._writes.clear()


class ModelledExecutor:
    """The results of steps, and their times by a `StepTime`."""

    def __init__(self, step_time: StepTime, *, seed: int = 0, tiers: ModelledTiers | None = None) -> None:
        """`seed` is that of what follows beams."""
        self._step_time = step_time
        self._tiers = tiers
        self._draw = random.Random(f"beams {seed}")
        self._beam_widths: dict[int, int] = {}
        """Row → width of the search that it is a beam of."""
        self._num_left: dict[int, int] = {}
        """Row → tokens that it still draws, where it ends by itself."""
        self._sampled: dict[int, int] = {}
        """Row → what it draws, where that is not `SAMPLED_TOKEN`."""

    def execute(self, plan: StepPlan, now: float = 0.0) -> tuple[StepResult, float]:
        """What a runner would return of a step that begins at `now`, and the seconds it would take."""
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
            length = output_length(new.params)
            if length is not None:
                self._num_left[new.row] = length - len(new.output_token_ids)
            elif self._num_left:
                self._num_left.pop(new.row, None)
        if self._sampled:
            # Samples that drew alike would be found in the prefix cache by each other.
            result.token_ids = [self._sampled.get(row, SAMPLED_TOKEN) for row in plan.sample_rows]
        if self._num_left:
            self._end_samples(plan, result)
        self._follow_beams(plan, result)
        if self._tiers is not None:
            result.offload, seconds = self._tiers.move(plan.offload, now, seconds)
        return result, seconds

    def forget(self) -> None:
        """The engine died: what was on its way is lost."""
        self._beam_widths.clear()
        self._sampled.clear()
        self._num_left.clear()
        if self._tiers is not None:
            self._tiers.forget()

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
            share = rest * (1.0 - self._draw.random())
            shares.append(share)
            rest = max(rest - share, 1e-300)
        shares.sort(reverse=True)
        return BeamCandidates(list(range(1, width + 1)), [math.log(share) for share in shares], [])
