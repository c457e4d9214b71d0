"""The tokens that begin and end a text, as config.json and generation_config.json give them."""

import json
from pathlib import Path
from typing import Any

from quire.errors import CheckpointError
from quire.model_config.config_json import ConfigJson, read_json
from quire.model_config.file_kinds import is_file


def read_first_token(config: ConfigJson) -> int | None:
    value = config.value("bos_token_id")
    if value is not None and type(value) is not int:
        raise config.refusal("bos_token_id", value, "a token id")
    return value


def read_end_tokens(path: Path, default: Any) -> tuple[int, ...]:
    """The ids of the end tokens in generation_config.json beside `path`; without it `default`, those of config.json."""
    if path.name != "config.json":  # a GGUF file has no files beside it
        return end_tokens(path, default)
    generation = path.with_name("generation_config.json")
    end = read_json(generation).get("eos_token_id") if is_file(generation) else None
    return end_tokens(path, default) if end is None else end_tokens(generation, end)


def end_tokens(path: Path, value: Any) -> tuple[int, ...]:
    """The ids of `eos_token_id` in the file `path`: one, several or none. Raises `CheckpointError`."""
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(f"{path}: eos_token_id is {json.dumps(value)}; supported: a token id or a list of them")
    return tuple(ids)
