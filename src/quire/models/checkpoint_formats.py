"""CHECKPOINT_FORMATS: how checkpoints are stored. A format is a row here and a file with its `TensorSource`.

The row's class is imported when a checkpoint needs it. It opens a folder with `open` and raises `CheckpointError` for
what is missing, truncated or at odds.
"""

import logging
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from quire.errors import CheckpointError
from quire.gguf.file import is_gguf
from quire.model_config.file_kinds import is_file
from quire.model_config.folder_kinds import describe_kind, name_some
from quire.model_config.packed_folder import PACKED_FILE
from quire.models.safetensors_weights import SafetensorsWeights
from quire.models.stored.layers import StoredLayers
from quire.models.weights import TensorSource
from quire.quantization.stored import StoredWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckpointFormat:
    """A row of CHECKPOINT_FORMATS."""

    source: str
    """The class, as "module:Class"."""
    files: tuple[str, ...]
    """A folder that holds one of these files is of this format."""


CHECKPOINT_FORMATS: dict[str, CheckpointFormat] = {
    "packed weights": CheckpointFormat("quire.models.packed_checkpoint:PackedCheckpoint", (PACKED_FILE,)),
    "safetensors": CheckpointFormat(
        "quire.models.safetensors_weights:SafetensorsWeights", ("model.safetensors.index.json", "model.safetensors")
    ),
}
"""The first row that fits a folder is taken."""


def open_checkpoint(folder: str | Path, stored: StoredWeights | None = None) -> TensorSource:
    """The weights of a checkpoint folder, whose config says that dense layers are `stored` in few bits, or of a GGUF
    file.

    Raises `CheckpointError` where no format fits or its files are damaged.
    """
    folder = Path(folder)
    if is_gguf(folder):
        from quire.models.gguf_weights import GgufWeights

        return GgufWeights.open(folder)
    for row in CHECKPOINT_FORMATS.values():
        if any(is_file(folder / name) for name in row.files):
            module, name = row.source.split(":")
            format_class: Any = getattr(import_module(module), name)
            source: TensorSource = format_class.open(folder)
            if (folder / "adapter_config.json").is_file():
                logger.warning(
                    "%s also holds adapter_config.json: the adapter is not applied, though transformers would; serve "
                    "it with enable_lora, or merge it with peft's merge_and_unload()",
                    folder,
                )
            if stored is not None and isinstance(source, SafetensorsWeights):
                return StoredLayers(source, stored)
            return source
    raise CheckpointError(_nothing_to_load(folder))


def _nothing_to_load(folder: Path) -> str:
    published = {name: row for name, row in CHECKPOINT_FORMATS.items() if PACKED_FILE not in row.files}
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled and (folder / "config.json").is_file():
        return (
            f"{folder} holds its weights in {name_some(pickled)}; loading pickled files can run code, so only "
            f"{', '.join(published)} are supported. Convert them once, with transformers installed: "
            'python -c "from transformers import AutoModelForCausalLM; '
            f'AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"'
        )
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    expected = " nor ".join(name for row in published.values() for name in reversed(row.files))
    shown = f"{folder} has neither {expected}; found {name_some(found) if found else 'nothing'}"
    kind = describe_kind(folder)
    if kind is not None:
        return f"{shown}. It is {kind}"
    return shown + _advice_on_names([name for name in found if name.endswith(".safetensors")])


def _advice_on_names(names: list[str]) -> str:
    """What to do about safetensors files of other names."""
    if not names:
        return ""
    if any(name.startswith("consolidated") for name in names):
        return (
            f". {name_some(names)} holds the weights under their maker's own names; download the files "
            "model*.safetensors of the model's Hugging Face repository"
        )
    if len(names) == 1:
        return f". If {names[0]} holds all of the model's weights, rename it to model.safetensors"
    return (
        f". {name_some(names)} look like shards; download model.safetensors.index.json, which says what each holds, "
        "from the model's repository"
    )
