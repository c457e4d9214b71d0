"""`quire show`: what is known of a kept model, without loading it."""

import json

from quire.cli.list import AsJson, describe_stored
from quire.engine.memory_sizes import show_bytes
from quire.engine.model_sources.names import parse_name
from quire.engine.model_sources.packages import ORIGIN_FILE
from quire.engine.model_sources.store import StoredModel, find_stored
from quire.model_config import read_json

_CONFIG_FIELDS = ("architectures", "torch_dtype", "dtype", "max_position_embeddings", "vocab_size")


def show(model: str, *, as_json: AsJson = False) -> None:
    """Show a model's folder, files, origin and the main fields of its config.json. Nothing is downloaded.

    Parameters
    ----------
    model
        A name as quire list shows it, with or without @revision or ==version.
    as_json
        Print JSON: sizes in bytes.
    """
    figures = [_figures(each) for each in find_stored(parse_name(model))]
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    for each in figures:
        for name, value in each.items():
            print(f"{name}: {_text(name, value)}")


def _figures(model: StoredModel) -> dict[str, object]:
    origin, config = model.folder / ORIGIN_FILE, model.folder / "config.json"
    found = read_json(config) if config.is_file() else {}
    return {
        **describe_stored(model),
        **{name: found[name] for name in _CONFIG_FIELDS if name in found},
        **({name: read_json(origin).get(name) for name in ("wheel", "sha256")} if origin.is_file() else {}),
        "files": {path.name: path.stat().st_size for path in sorted(model.folder.iterdir()) if path.is_file()},
    }


def _text(name: str, value: object) -> str:
    if isinstance(value, dict):
        return "".join(f"\n  {file}  {show_bytes(size)}" for file, size in value.items())
    if name == "size" and isinstance(value, int):
        return show_bytes(value)
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return json.dumps(value) if isinstance(value, bool) else str(value)
