"""write_gguf_model: a model as one GGUF file, which llama.cpp reads too."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quire.convert.block_writers import BLOCK_WRITERS
from quire.convert.floats import each_tensor
from quire.convert.gguf_file import PlannedTensor, header_bytes, place
from quire.convert.gguf_metadata import check_read_alike, factors_of, metadata_of
from quire.convert.gguf_names import GgufNames
from quire.convert.gguf_tokenizer import tokenizer_metadata
from quire.convert.original import Original
from quire.convert.target import BLOCKS
from quire.errors import CheckpointError
from quire.gguf.block_types import BLOCK_TYPES_BY_NAME
from quire.gguf.file import GgufFile, is_gguf, read_gguf
from quire.gguf.header import Value
from quire.gguf.names import FACTORS, family_key
from quire.model_config import ModelConfig
from quire.models.gguf_weights import row_orders

_NORMS = ("norm", "norm_2")
_FLOAT_PARTS = ("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd", "attn_q_norm", "attn_k_norm")
"""Matrices that stay in F32: they are small, and an error in a router chooses other experts."""
_ENDS = ("token_embd", "output")
_END_BLOCK = "Q8_0"
"""An error in the head goes straight into the logits: blocks of fewer bits leave it and the embedding in this."""


def write_gguf_model(original: Original, path: Path, block: str, on_bytes: Callable[[int], None]) -> None:
    """Write a model to `path`, matrices as `block`. Raises `CheckpointError` for a model that has no GGUF form."""
    config, source = original.config, original.path
    shapes: dict[str, tuple[int, ...]] = {}
    each_tensor(original, lambda name, tensor: shapes.update({name: tuple(tensor.shape)}))
    file = read_gguf(source) if is_gguf(source) else None
    names = GgufNames.of(config, shapes, None if file is None else family_key(file))
    tensors = place(_plan(config, names, shapes, block, file))
    kept = _kept(file) if file else {**metadata_of(config, names, source), **tokenizer_metadata(config, source)}
    metadata: dict[str, Value] = {**kept, "general.file_type": BLOCKS[block], "general.quantization_version": 2}
    writer = _Writer(path, metadata, tensors, names, on_bytes)
    with path.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, writer.num_bytes)
        os.pwrite(stream.fileno(), writer.header, 0)
        writer.descriptor = stream.fileno()
        for name, factors in _factors(config, file).items():
            writer.write(name, 0, torch.tensor(factors)[None])
        each_tensor(original, writer.add)
        os.fsync(stream.fileno())
    check_read_alike(config, path)


def _kept(file: GgufFile) -> dict[str, Value]:
    """The metadata of a GGUF source, but for what says how it was stored."""
    return {key: value for key, value in file.metadata.items() if not key.startswith(("split.", "general.alignment"))}


def _factors(config: ModelConfig, file: GgufFile | None) -> dict[str, list[float]]:
    """Tensors that are part of the config."""
    if file is None:
        return factors_of(config.rope, config.head_dim)
    return {name: file.floats_of(name, file.tensors[name].shape[-1]) for name in FACTORS if name in file.tensors}


def _plan(
    config: ModelConfig,
    names: GgufNames,
    shapes: Mapping[str, tuple[int, ...]],
    block: str,
    file: GgufFile | None,
) -> dict[str, PlannedTensor]:
    planned = {name: PlannedTensor("F32", (len(factors),)) for name, factors in _factors(config, file).items()}
    stacks: dict[str, int] = {}
    for name, shape in shapes.items():
        to = names.places[name]
        shape = _as_stored(shape)
        if to.slot is None:
            planned[to.name] = PlannedTensor(_block_of(to.part, shape, block), shape)
        else:
            stacks[to.name] = max(stacks.get(to.name, 0), to.slot + 1)
            planned[to.name] = PlannedTensor(_block_of(to.part, shape, block), (stacks[to.name], *shape))
    return planned


def _as_stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    """GGUF has no matrices of one row."""
    return shape[1:] if len(shape) == 2 and shape[0] == 1 else shape


def _block_of(part: str, shape: tuple[int, ...], block: str) -> str:
    """How a tensor is stored: matrices as `block` if its blocks fit their rows, else in 16 bits; all else in F32."""
    if len(shape) < 2 or part in _FLOAT_PARTS:
        return "F32"
    if part in _ENDS and block not in ("F32", "F16", "BF16"):
        block = _END_BLOCK
    return block if shape[-1] % BLOCK_TYPES_BY_NAME[block].num_values == 0 else "F16"


class _Writer:
    """Puts each tensor where it belongs in the file."""

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Value],
        tensors: Mapping[str, PlannedTensor],
        names: GgufNames,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._tensors, self._names, self._on_bytes = tensors, names, on_bytes
        self.header = header_bytes(metadata, tensors)
        self.num_bytes = len(self.header) + max(each.begin + each.num_bytes for each in tensors.values())
        self.descriptor = -1
        orders = row_orders(GgufFile(path, (path,), metadata, {}), names.family.row_order)
        self._orders = {part: order.argsort() for part, order in orders.items()}
        self._done = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor of the checkpoint, as it is stored there."""
        to, family = self._names.places[name], self._names.family
        if to.part in self._orders:
            tensor = tensor[self._orders[to.part]]
        if family.unit_offset and to.part.endswith(_NORMS):
            tensor = tensor.float() + 1
        planned = self._tensors[to.name]
        rows = tensor.reshape(-1, tensor.shape[-1])
        part_bytes = planned.num_bytes if to.slot is None else planned.num_bytes // planned.shape[0]
        self.write(to.name, part_bytes * (to.slot or 0), rows)

    def write(self, name: str, offset: int, rows: Tensor) -> None:
        planned = self._tensors[name]
        if planned.block == "F16" and bool((rows.abs() > torch.finfo(torch.float16).max).any()):
            raise CheckpointError(f"{name} has numbers that F16 cannot hold; use gguf:BF16 or gguf:Q8_0")
        content = BLOCK_WRITERS[planned.block](rows.float()).contiguous().numpy().data.cast("B")
        begin = len(self.header) + planned.begin + offset
        while content:
            written = os.pwrite(self.descriptor, content, begin)
            begin, content, self._done = begin + written, content[written:], self._done + written
        self._on_bytes(self._done)
