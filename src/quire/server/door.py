"""Door: refuses requests unread while the engine's queue is full and many come.

A request is read and checked before it is refused, so that one that can never be served is answered 400 and not asked
to come again. That takes nearly twice the time. So only `CHECKS_PER_SECOND` requests that a full queue will refuse are
checked first.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from quire.server.backend import Engine

CHECKS_PER_SECOND = 10.0
MAX_CHECKS = 10.0
"""Checks that are left over from quieter times."""


@dataclass(slots=True)
class Door:
    """One per server. `check` writes it."""

    clock: Callable[[], float] = time.monotonic
    _balance: float = MAX_CHECKS
    """Requests that may still be checked."""
    _balanced_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._balanced_at = self.clock()

    def check(self, engine: Engine, tenant: str | None) -> None:
        """Raise `QueueFullError` for a request that a full queue will refuse, unless it is to be checked first."""
        refusal = engine.queue_refusal(tenant)
        if refusal is None:
            return
        now = self.clock()
        earned = (now - self._balanced_at) * CHECKS_PER_SECOND
        self._balance, self._balanced_at = min(MAX_CHECKS, self._balance + earned), now
        if self._balance < 1.0:
            raise refusal
        self._balance -= 1.0
