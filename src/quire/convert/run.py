"""convert_model: one model, found by name, into one result."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from quire.convert.companions import copy_companions, write_json
from quire.convert.floats import each_tensor
from quire.convert.gguf_model import write_gguf_model
from quire.convert.original import Original
from quire.convert.output import unfinished
from quire.convert.packed import write_packed
from quire.convert.target import Target
from quire.engine.checkpoint import read_model_config
from quire.errors import CheckpointError
from quire.gguf.file import is_gguf
from quire.lora.adapter_folder import AdapterFolder
from quire.model_config import read_json
from quire.model_config.packed_folder import PACKED_FILE
from quire.models.safetensors_file import DTYPES
from quire.models.safetensors_weights import INDEX_FILE, SINGLE_FILE
from quire.models.safetensors_writer import SafetensorsWriter

_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
OnBytes = Callable[[int], None]
"""Hears how many bytes of the result are made so far."""


class Converted(NamedTuple):
    """A result."""

    path: Path
    num_bytes: int
    parameters: int


def convert_model(
    source: Path,
    target: Target,
    output: Path,
    on_bytes: OnBytes = lambda count: None,
    *,
    adapter: Path | None = None,
) -> Converted:
    """Convert the model in the folder or GGUF file `source` into `output`, which must not exist. The adapter in the
    folder `adapter`, as peft writes it, is merged into the weights.

    Raises `CheckpointError` for a model that cannot be converted, or a disk that cannot be written, and `ConfigError`
    for a place that is taken. Then nothing is left of the result.
    """
    config = read_model_config(source)
    original = Original(config, source, None if adapter is None else AdapterFolder.open(adapter))
    with unfinished(output) as folder:
        made = folder / output.name
        if target.kind == "gguf":
            write_gguf_model(original, made, target.form, on_bytes)
        else:
            made.mkdir()
            copy_companions(source, made)
            if target.kind == "packed":
                write_json(made / PACKED_FILE, write_packed(original, made, target.form, on_bytes))
            else:
                _write_floats(original, made, target.form, on_bytes)
        size = sum(path.stat().st_size for path in (made.rglob("*") if made.is_dir() else [made]) if path.is_file())
    return Converted(output, size, config.spec.num_parameters)


def _write_floats(original: Original, folder: Path, dtype: str, on_bytes: OnBytes) -> None:
    writer = SafetensorsWriter(folder, "model")

    def write(name: str, tensor: Tensor) -> None:
        stored = tensor.to(getattr(torch, dtype)).contiguous()
        if not bool(stored.isfinite().all()) and bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{original.path}: {name} has numbers that {dtype} cannot hold; convert to bf16 or fp32"
            )
        writer.add(name, _NAMES[dtype], stored.shape, stored.view(-1).view(torch.uint8).numpy().data)
        on_bytes(writer.num_bytes)

    each_tensor(original, write, transposes=True)
    where = writer.finish()
    if set(where.values()) != {SINGLE_FILE}:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": writer.num_bytes}, "weight_map": where})
    values = read_json(folder / "config.json")
    for key in ("quantization_config", "compression_config", "quantization"):
        values.pop(key, None)
    (folder / "quantize_config.json").unlink(missing_ok=True)
    values.pop("torch_dtype", None)
    write_json(folder / "config.json", {**values, "dtype": dtype})


def default_output(source: Path, name: str, target: Target) -> Path:
    """Where a result goes by default: into the working folder, under the model's own name."""
    stem = source.stem if is_gguf(source) else name.rpartition("/")[2].removeprefix("pypi:")
    return Path(f"{stem}{target.ending}")
