"""Finds a model's files: the bundled model, a folder, or a repository of the Hugging Face hub, downloaded on demand."""

import os
from pathlib import Path
from typing import Any

from quire.config import EngineConfig
from quire.errors import CheckpointError, RequestError
from quire.model_config import read_json
from quire.sampling_params import SamplingParams

BUNDLED_NAME = "quire-bundled"
_DEFAULT_PARAMS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "LICENSE*")


def bundled_folder() -> Path:
    """The small model that ships with the package."""
    return Path(__file__).parents[1] / "bundled"


def find_model(model: str, revision: str | None = None) -> Path:
    """The folder of `model`: "" is the bundled model, a path is a folder, "org/name" is a hub model.

    A hub model is downloaded once. The revision is resolved to one commit, from which all files come. Raises
    `CheckpointError` for a model that cannot be found.
    """
    if not model or model == BUNDLED_NAME:
        return bundled_folder()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(
            f"{model} is not a folder; give the folder of a checkpoint or a hub name such as org/name"
        )
    return _download(model, revision)


def model_name(model: str) -> str:
    """The default name of the model in the server: a folder's own name, since clients need not know where it lies."""
    if not model:
        return BUNDLED_NAME
    folder = Path(model).expanduser()
    return os.path.basename(os.path.abspath(folder)) if folder.is_dir() else model


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


def _download(model: str, revision: str | None) -> Path:
    """A hub model's folder in the hub's cache. Files in the cache are not downloaded again."""
    from huggingface_hub import snapshot_download  # only hub models need it
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        # One call resolves the revision to a commit and takes every file from it. Without a connection it returns the
        # earlier download of that revision.
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_FILES)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(f"{model} is neither a folder here nor a model on the hub") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model} is no folder here, the hub cannot be reached, and nothing was downloaded before; "
            "give the folder of a checkpoint"
        ) from error
    except Exception as error:  # network libraries raise many classes of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{model} could not be downloaded: {reason}") from error
