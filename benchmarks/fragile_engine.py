"""An engine process that dies of prompts that begin with `DEADLY`: a real one with a fault that one request meets."""

import os
import sys
from itertools import accumulate

from quire.engine.core import EngineCore
from quire.engine.engine_process import Connection, import_engine, load_core, main
from quire.engine.executor import PendingStep
from quire.engine.messages import Load
from quire.step import StepPlan

PROGRAM = "benchmarks.fragile_engine"
DEADLY = [7, 7, 7, 7]
COMMAND = (
    "-c",
    f"from quire.engine import engine_child; engine_child.PROGRAM = {PROGRAM!r}; import sys; "
    "from quire.cli import main; sys.argv[0] = 'quire'; main()",
)
"""Arguments of Python for a `quire` with this engine; quire's own follow."""


def load_fragile_core(load: Load, connection: Connection) -> EngineCore:
    """A core whose executor dies as it would of a fault in a kernel: in the middle of a step."""
    core = load_core(load, connection)
    launch = core._executor.launch

    def fragile_launch(plan: StepPlan) -> PendingStep:
        starts = accumulate(plan.num_scheduled_tokens, initial=0)
        if any(plan.token_ids[at : at + len(DEADLY)] == DEADLY for at in starts):
            os._exit(9)
        return launch(plan)

    core._executor.launch = fragile_launch  # type: ignore[method-assign]
    return core


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), load_fragile_core, import_engine)
