"""`quire plan`: what a model would take of the memory, from its config.json alone."""

import json
from typing import Annotated, Any

from cyclopts import Parameter

from quire.cli.options import ModelArgument, flags
from quire.config import EngineConfig
from quire.engine.checkpoint import find_model
from quire.engine.memory_plan import plan_memory
from quire.model_config import ModelConfig


@flags(EngineConfig)
def plan(
    model: ModelArgument = "",
    *,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    **options: Any,
) -> None:
    """Show what a model takes of the memory, and how much context fits, without loading it.

    Parameters
    ----------
    model
        Folder of a Hugging Face checkpoint, or a hub name; the bundled model if left out.
    as_json
        Print the plan as JSON, sizes in bytes.
    """
    config = EngineConfig.from_options({"model": model, **options})
    memory_plan = plan_memory(config, ModelConfig.from_folder(find_model(config.model, config.revision)))
    if as_json:
        print(json.dumps(memory_plan.to_dict(), indent=2))
    else:
        print("\n".join(memory_plan.describe()))
