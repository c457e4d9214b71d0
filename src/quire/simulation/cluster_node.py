"""Node: one replica of a simulated cluster, the engine's own scheduler and block pool with a modelled executor.

Most steps do nothing but give each running sequence a token. A node computes the times of a run of such steps at once
(`PlainRun`), and its scheduler catches up when the run ends or is cut short.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from quire.kv_cache.block_hash import BlockHash, TokenKey
from quire.kv_cache.block_pool import BlockPool
from quire.outputs import StepDeltas
from quire.request import Request
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.simulation.modelled_executor import SAMPLED_TOKEN, ModelledExecutor
from quire.step import StepPlan, StepResult

OnBlocks = Callable[[BlockHash, bool], None]
"""Called with a block's hash, and whether it is stored (or else gone)."""


class PlainRun:
    """Steps of a node that only give each running sequence a token."""

    __slots__ = ("_num_told", "request_ids", "times")

    def __init__(self, request_ids: list[str], times: list[float]) -> None:
        self.request_ids = request_ids
        self.times = times
        """When the first step begins, and when each ends, where the next begins."""
        self._num_told = 0

    def num_begun(self, now: float) -> int:
        """Steps that have begun."""
        return min(bisect_right(self.times, now), len(self.times) - 1)

    def take_tokens(self, now: float) -> int:
        """Tokens that each sequence has gained since the last call."""
        num_ended = bisect_right(self.times, now) - 1
        num_new, self._num_told = num_ended - self._num_told, num_ended
        return num_new


class Node:
    """Runs a step, or a run of plain steps, at a time: `begin`, and at `ends_at` `end_step` or `end_plain_run`."""

    def __init__(
        self,
        make_executor: Callable[[], ModelledExecutor],
        limits: SchedulerLimits,
        *,
        num_blocks: int,
        block_size: int,
        clock: Callable[[], float],
        on_blocks: OnBlocks,
    ) -> None:
        self._make_executor = make_executor
        self._limits = limits
        self._num_blocks, self._block_size = num_blocks, block_size
        self._clock = clock
        self._on_blocks = on_blocks
        self.is_up = True
        self.turn = 0
        """Counts what it began, and its deaths: what had begun before has no end."""
        self.busy_seconds = 0.0
        self.num_computed = 0
        """Tokens computed in all lives."""
        self.num_steps = 0
        self.ends_at = 0.0
        """When the step or run ends that goes on now."""
        self.plain_run: PlainRun | None = None
        """The run of plain steps that goes on now."""
        self._hits = self._queries = 0
        self._step: tuple[StepPlan, StepResult] | None = None
        self._start()

    def _start(self) -> None:
        pool = BlockPool(self._num_blocks, self._block_size)
        pool.stored_listeners.append(self._note_stored)
        pool.eviction_listeners.append(lambda _, block_hash: self._on_blocks(block_hash, False))
        self._executor = self._make_executor()
        self.scheduler = Scheduler(pool, self._limits, clock=self._clock)

    def _note_stored(
        self, block: int, block_hash: BlockHash, parent: BlockHash, token_ids: Sequence[TokenKey] | None
    ) -> None:
        self._on_blocks(block_hash, True)

    @property
    def prefix_hits(self) -> tuple[int, int]:
        """Prompt tokens found in the cache, and prompt tokens."""
        stats = self.scheduler.stats()
        return self._hits + stats.total_prefix_hits, self._queries + stats.total_prefix_queries

    def add(self, request: Request, block_hashes: Sequence[BlockHash], now: float) -> bool:
        """Queue a request, with the hashes of its prompt's blocks. Raises `RequestError` for one that never fits.

        Returns whether it cuts a run of plain steps short, which then `ends_at` another time.
        """
        self.scheduler.add(request, block_hashes)
        run = self.plain_run
        if run is None or run.num_begun(now) == len(run.times) - 1:
            return False
        del run.times[run.num_begun(now) + 1 :]
        self.turn, self.ends_at = self.turn + 1, run.times[-1]
        return True

    def begin(self, now: float) -> bool:
        """Begin a step, or a run of plain steps, which `ends_at` a time; False if there is nothing to do."""
        if not self.is_up or self._step is not None or self.plain_run is not None or not self.scheduler.has_work:
            return False
        self.turn += 1
        plain = self.scheduler.plain_steps()
        if plain.num_steps > 1:
            times = self._executor.times_of(plain, now)
            self.plain_run = PlainRun([sequence.sample[0] for sequence in plain.sequences], times)
            self.ends_at = times[-1]
            return True
        plan = self.scheduler.schedule()
        result, seconds = self._executor.execute(plan, now)
        self._step, self.ends_at = (plan, result), now + seconds
        self.busy_seconds += seconds
        self.num_steps += 1
        self.num_computed += plan.num_tokens
        return True

    def end_step(self) -> StepDeltas:
        """The tokens of the step that has run."""
        assert self._step is not None
        step, self._step = self._step, None
        return self.scheduler.update(*step)

    def end_plain_run(self) -> None:
        """All steps of the run have ended, and its tokens were taken."""
        assert self.plain_run is not None
        num_steps = self._count_run(self.plain_run, self.ends_at)
        self.scheduler.repeat_plain_steps(num_steps, SAMPLED_TOKEN)
        self.plain_run = None

    def die(self, now: float) -> None:
        """Lose the step, all requests and all blocks."""
        self.is_up = False
        self.turn += 1
        if self.plain_run is not None:
            self._count_run(self.plain_run, now)
        self._hits, self._queries = self.prefix_hits
        self._step = self.plain_run = None
        self._start()

    def _count_run(self, run: PlainRun, now: float) -> int:
        """Count the steps of a run that have begun, and return their number."""
        num_steps = run.num_begun(now)
        for begin, end in pairwise(run.times[: num_steps + 1]):
            self.busy_seconds += end - begin
        self.num_steps += num_steps
        self.num_computed += num_steps * len(run.request_ids)
        return num_steps
