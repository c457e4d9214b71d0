"""Kinds of folders that Quire cannot read, and what to do with each: the words for error messages."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_NUM_NAMED = 5
"""File names a message gives before it says how many more there are."""


class FolderKind(NamedTuple):
    """A kind of folder: how it is recognised, what it is, and what to do."""

    fits: Callable[[set[str]], bool]
    """Whether a folder with files and folders of these names is of this kind."""
    name: str
    advice: str


def _has(*names: str) -> Callable[[set[str]], bool]:
    return lambda found: not found.isdisjoint(names)


def _begins(*starts: str) -> Callable[[set[str]], bool]:
    return lambda found: any(name.startswith(starts) for name in found)


def _ends(*ends: str) -> Callable[[set[str]], bool]:
    return lambda found: any(name.endswith(ends) for name in found)


_CONVERT = (
    "convert it to the Hugging Face format, for which transformers has a script for each family "
    "(transformers/models/<family>/convert_*.py), or download the model's Hugging Face repository"
)

FOLDER_KINDS = (
    FolderKind(
        _has("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
        "a LoRA adapter, which changes a base model and is none itself",
        "give the base model's folder, which adapter_config.json names as base_model_name_or_path; or merge both with "
        "peft's merge_and_unload() and save the result",
    ),
    FolderKind(
        lambda found: {"refs", "snapshots"} <= found or {"blobs", "snapshots"} <= found,
        "the hub's cache of one model, whose files are below snapshots/",
        "give the model's name, org/name, or the folder snapshots/<commit>",
    ),
    FolderKind(
        _begins("models--"),
        "the hub's cache of several models",
        "give a model's name, org/name, or the folder models--<org>--<name>/snapshots/<commit>",
    ),
    FolderKind(
        _has("model_index.json"),
        "a diffusers pipeline, which makes images",
        "give the folder of a language model; the text encoder of a pipeline is a folder inside it",
    ),
    FolderKind(
        lambda found: "params.json" in found and _begins("consolidated")(found),
        "a checkpoint in its maker's own format (params.json and consolidated.*, of Mistral or Meta)",
        _CONVERT,
    ),
    FolderKind(
        _ends(".gguf"),
        "a GGUF model",
        "give the path of its file",
    ),
    FolderKind(
        _ends(".ckpt.index", ".h5", ".msgpack", ".onnx", ".tflite", ".mlmodelc", ".engine"),
        "a model for TensorFlow, Flax, ONNX or another runtime",
        "give a folder with safetensors files; transformers converts TensorFlow and Flax weights with "
        "from_pretrained(folder, from_tf=True) or from_flax=True",
    ),
    FolderKind(
        lambda found: "config.json" not in found and _begins("checkpoint-")(found),
        "the output of a training run, whose checkpoints are folders inside it",
        "give one of its checkpoint-<step> folders",
    ),
    FolderKind(
        lambda found: "config.json" not in found and _ends(".safetensors")(found),
        "a folder with weights and without config.json, which says what model they are of",
        "put the config.json of the model's repository beside them",
    ),
    FolderKind(
        lambda found: "config.json" not in found and _has("tokenizer.json", "tokenizer_config.json")(found),
        "a tokenizer without a model",
        "give the model's folder, and this one with --tokenizer",
    ),
)
"""The first kind that fits is named."""


def describe_kind(folder: Path) -> str | None:
    """What a folder is and what to do, for a folder of a known kind; None for any other."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for kind in FOLDER_KINDS:
        if kind.fits(found):
            return f"{kind.name}; {kind.advice}"
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inside and "config.json" not in found:
        return f"the folder of the checkpoints {name_some(inside)}; give one of these"
    return None


def describe_missing(path: Path) -> str:
    """Why a folder without its config.json `path` is refused."""
    folder = path.parent
    shown = f"{path} is missing; a Hugging Face checkpoint folder holds one"
    kind = describe_kind(folder)
    if kind is not None:
        return f"{shown}. {folder} is {kind}"
    found = sorted(entry.name for entry in folder.iterdir())
    return f"{shown}. {folder} " + (f"holds {name_some(found)}" if found else "is empty")


def name_some(names: list[str]) -> str:
    """The first few names, and the number of the others."""
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more
