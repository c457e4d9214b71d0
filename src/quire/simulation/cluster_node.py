"""Node: one replica of a simulated cluster, the engine's own scheduler and block pool with a modelled executor."""

from collections.abc import Callable, Sequence

from quire.kv_cache.block_hash import BlockHash, TokenKey
from quire.kv_cache.block_pool import BlockPool
from quire.outputs import StepDeltas
from quire.request import Request
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.simulation.modelled_executor import ModelledExecutor
from quire.step import StepPlan, StepResult

OnBlocks = Callable[[BlockHash, bool], None]
"""Called with a block's hash, and whether it is stored (or else gone)."""


class Node:
    """Runs one step at a time: `begin_step`, and when its seconds have passed `end_step`."""

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
        self.life = 0
        """Counts its deaths: a step of an earlier life has no end."""
        self.busy_seconds = 0.0
        self.num_computed = 0
        """Tokens computed in all lives."""
        self.num_steps = 0
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

    @property
    def is_idle(self) -> bool:
        """No step runs."""
        return self._step is None

    def add(self, request: Request) -> None:
        """Queue a request. Raises `RequestError` for one that never fits."""
        self.scheduler.add(request)

    def begin_step(self, now: float) -> float | None:
        """Begin a step, and return the seconds that it takes; None if there is nothing to do."""
        if not self.is_up or self._step is not None or not self.scheduler.has_work:
            return None
        plan = self.scheduler.schedule()
        result, seconds = self._executor.execute(plan, now)
        self._step = plan, result
        self.busy_seconds += seconds
        self.num_steps += 1
        self.num_computed += plan.num_tokens
        return seconds

    def end_step(self) -> StepDeltas:
        """The tokens of the step that has run."""
        assert self._step is not None
        step, self._step = self._step, None
        return self.scheduler.update(*step)

    def die(self) -> None:
        """Lose the step, all requests and all blocks."""
        self.is_up = False
        self.life += 1
        self._hits, self._queries = self.prefix_hits
        self._step = None
        self._start()
