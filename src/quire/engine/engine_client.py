"""EngineClient: the engine processes as seen from the process that answers clients: one at a time.

torch is not imported here, so this process answers while weights load. A process that dies is replaced. So is one that
does not advance (`watchdog`). Deaths without progress make the replacements come later and later (`breaker`), but they
come. Only a first load that fails is final.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from quire import errors
from quire.engine.breaker import Breaker
from quire.engine.engine_child import Death, EngineChild
from quire.engine.messages import Failed, FromEngine, Load, Ready, ToEngine
from quire.engine.spare_child import SpareChild, wants_spare
from quire.engine.watchdog import LOOK_SECONDS, Watchdog, step_allowance, step_limit
from quire.errors import EngineDeadError, EngineUnavailableError, QuireError

logger = logging.getLogger(__name__)

READY_SECONDS = 10.0
"""An engine with work that has not advanced for longer is not ready."""


@dataclass(frozen=True, slots=True)
class Owner:
    """What the owner of an `EngineClient` does at the events in the life of its processes."""

    on_message: Callable[[FromEngine], None]
    """Gets every message except `Ready` and `Failed`."""
    on_death: Callable[[Death], bool]
    """A process died and another one will be started; returns whether something was computed since the last death."""
    on_spawn: Callable[[], None]
    """A process was started and has its `Load` message; it takes messages."""
    on_ready: Callable[[], None]
    """A process can compute."""
    on_failure: Callable[[QuireError], None]
    """There will be no engine, for this reason."""
    has_work: Callable[[], bool]
    """Whether somebody waits for the engine to compute."""


class EngineClient:
    """All methods run on the event loop that called `start`."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._phase = "loading"
        self._draining = False
        self._load: Load | None = None
        self._child: EngineChild | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        """Set when the first load has ended, well or not."""
        self._failure: QuireError | None = None
        self._sent = asyncio.Event()
        self._spare = SpareChild()
        self._watchdog = Watchdog()
        self._breaker = Breaker()
        self._cause = ""
        self._starts_again_at = 0.0

    @property
    def state(self) -> str:
        """loading, ready, draining, restarting, down (waiting to restart), dead"""
        return "draining" if self._draining and self._phase != "dead" else self._phase

    @property
    def advances(self) -> bool:
        """Whether the engine can compute, and does so if it has work."""
        return self.state == "ready" and self._watchdog.stalled < READY_SECONDS

    @property
    def outage(self) -> EngineUnavailableError | None:
        """Why there is no engine for a while, and until when; None if there is one or one is being started."""
        if self._phase != "down":
            return None
        seconds = max(1, math.ceil(self._starts_again_at - time.monotonic()))
        return EngineUnavailableError(
            f"the engine died {self._breaker.num_deaths} times without computing anything: {self._cause}. "
            f"It starts again in {seconds} s",
            retry_after=seconds,
        )

    @property
    def pid(self) -> int:
        """Process id of the engine process."""
        assert self._child is not None, "start() comes first"
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code of the engine process, None while it runs."""
        assert self._child is not None, "start() comes first"
        return self._child.exit_code

    async def start(self, load: Load) -> None:
        """Start a process. It goes on loading when this returns."""
        self._load = load
        child = await self._spawn()
        self._supervisor = asyncio.create_task(self._supervise(child))

    def send(self, message: ToEngine) -> None:
        """Send a message; dropped while there is no process, because `on_spawn` will send what the next one needs."""
        if self._child is not None and self._phase not in ("down", "dead"):
            self._child.send(message)
            self._sent.set()

    async def wait_ready(self) -> None:
        """Return when the engine can compute for the first time. Raises the reason if it never will."""
        await self._settled.wait()
        if self._failure is not None:
            raise self._failure

    def drain(self) -> None:
        """Mark the engine as shutting down: it is still restarted if it dies."""
        self._draining = True

    async def shutdown(self) -> None:
        """End the process."""
        self._phase = "dead"
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait((self._supervisor,))
        await self._spare.end()
        if self._child is not None:
            await self._child.end()

    async def _spawn(self) -> EngineChild:
        assert self._load is not None
        child = self._child = self._spare.take() or await EngineChild.spawn()
        child.send(self._load)
        self._owner.on_spawn()
        return child

    async def _supervise(self, child: EngineChild) -> None:
        """Run one process after the other. Ends if the first load fails."""
        while True:
            death = await self._run(child)
            if self._failure is not None:
                return
            if self._phase == "loading":
                self._fail(EngineDeadError(f"the engine process died while loading: {death.cause}"))
                return
            logger.error("the engine process died: %s", death.cause)
            await self._back_off(death)
            while (next_child := await self._try_spawn()) is None:
                pass
            child = next_child

    async def _try_spawn(self) -> EngineChild | None:
        """Start a process. If the system cannot, wait and return None."""
        self._phase = "restarting"
        try:
            return await self._spawn()
        except (OSError, RuntimeError) as error:
            logger.error("no engine process can be started: %s", error)
            await self._back_off(Death("the system cannot start a process", True, frozenset()))
            return None

    async def _back_off(self, death: Death) -> None:
        """Count the death, and wait as long as the breaker says."""
        self._cause = death.cause
        self._phase = "restarting"
        delay = self._breaker.count_death(progress=self._owner.on_death(death))
        if delay:
            self._phase, self._starts_again_at = "down", time.monotonic() + delay
            logger.error("%s", self.outage)
            await asyncio.sleep(delay)

    async def _run(self, child: EngineChild) -> Death:
        """Handle the messages of a process until it is dead."""
        watch = asyncio.create_task(self._watch(child))
        failed = ""
        try:
            async for message in child.messages():
                match message:
                    case Ready():
                        self._become_ready(child)
                    case Failed(kind, text) if self._phase == "loading":
                        self._fail(getattr(errors, kind, QuireError)(text))
                    case Failed(kind, text):
                        failed = f"{kind} while loading"
                        logger.error("%s: %s", failed, text)
                    case _:
                        self._owner.on_message(message)
        except Exception:
            # The process is at fault, or what it sent is: a new one starts from what this process knows.
            logger.exception("a message of the engine process cannot be handled")
            child.kill("a message of it cannot be handled")
        finally:
            watch.cancel()
        death = await child.wait_dead()
        return Death(failed or death.cause, death.while_loading, death.in_step)

    def _become_ready(self, child: EngineChild) -> None:
        child.is_ready = True
        self._phase = "ready"
        self._watchdog.rest()
        self._settled.set()
        self._owner.on_ready()
        if self._load is not None and wants_spare(self._load.config.spare):
            self._spare.start_later()

    async def _watch(self, child: EngineChild) -> None:
        """Kill the process when it has work and does not advance."""
        assert self._load is not None
        config = self._load.config
        self._watchdog.rest()
        while True:
            if child.is_ready and child.is_idle and not self._owner.has_work():
                self._watchdog.rest()
                self._sent.clear()
                await self._sent.wait()  # an idle engine is not looked at: this process sleeps as well
            await asyncio.sleep(LOOK_SECONDS)
            activity = child.activity()
            work = None if activity is None else activity.work
            allowance = 0.0
            if child.is_ready:
                limit = step_limit(config.step_timeout, child.record.longest_step)
                allowance = step_allowance(self._load.plan)
                self._watchdog.look(time.monotonic(), child.record.beat, work)
                what = "a step did not end"
            else:
                limit = config.load_timeout
                intake = None if activity is None else activity.intake
                self._watchdog.look(time.monotonic(), (child.record.beat, child.num_received, intake), work)
                what = "loading made no progress"
            if self._watchdog.overdue(limit, allowance):
                child.kill(f"{what} in {self._watchdog.stalled:.0f} s")
                return

    def _fail(self, error: QuireError) -> None:
        self._phase = "dead"
        self._failure = error
        self._settled.set()
        self._owner.on_failure(error)
