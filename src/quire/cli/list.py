"""`quire list`: the models kept on this machine."""

import json
from typing import Annotated

from cyclopts import Parameter

from quire.engine.memory_sizes import show_bytes
from quire.engine.model_sources.store import StoredModel, stored_models

AsJson = Annotated[bool, Parameter(name="--json", negative=())]


def list(*, as_json: AsJson = False) -> None:
    """List the models in the hub's cache and those from packages.

    Parameters
    ----------
    as_json
        Print JSON: sizes in bytes.
    """
    models = stored_models()
    if as_json:
        print(json.dumps([describe_stored(model) for model in models], indent=2))
    elif not models:
        print("no models are kept here; quire pull org/name downloads one")
    else:
        rows = [("MODEL", "REVISION", "SIZE", "NOTE"), *map(_row, models)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def describe_stored(model: StoredModel) -> dict[str, object]:
    """A kept model, ready for JSON."""
    return {
        "name": model.name,
        "revision": model.revision,
        "refs": model.refs,
        "size": model.size,
        "readable": model.is_readable,
        "folder": str(model.folder),
    }


def _row(model: StoredModel) -> tuple[str, str, str, str]:
    note = ", ".join(model.refs) if model.is_readable else "no config.json with safetensors"
    return model.name, model.revision[:12], show_bytes(model.size), note
