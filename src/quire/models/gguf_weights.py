"""GgufWeights: the tensors of a GGUF model under their original names, in the original order of rows.

Matrices in blocks of few bits are given as they are stored, views of the mapped file; only where llama.cpp's converter
reordered rows of queries and keys is a copy made here. All else becomes floats.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.gguf.file import GgufFile, read_gguf
from quire.gguf.names import NamedTensor, family_of, named_tensors
from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.blocks import dequantize
from quire.layers.linear import LinearWeight, Table
from quire.model_config.folder_kinds import name_some
from quire.models.mapped_file import MappedFile

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LATENT_UP = "kv_b_proj.weight"
_DELTA_NET = "linear_attn.in_proj_qkvz"
_NORMS = ("norm", "norm_2")
"""How the names of norms end, apart from their layer's number."""
_OTHER_NORMS = ("ssm_norm",)
"""Norms without an offset in families that store the others as 1 + weight."""
_DECAYS = "ssm_a"
"""Stored as -exp of the original's A_log."""


class GgufWeights:
    """A `TensorSource` of one model; every tensor must be asked for."""

    activation_dtype = torch.float32

    def __init__(self, file: GgufFile) -> None:
        self._path = file.path
        self._file = file
        self._family = family_of(file)
        self._row_orders = row_orders(file, self._family.row_order)
        self._tensors: Mapping[str, NamedTensor] = named_tensors(file)
        self._taken: set[str] = set()
        self._mapped: dict[Path, MappedFile] = {}
        self._stacks: dict[tuple[Path, int], Tensor] = {}
        """By file and first byte, the matrices of all experts that lie there."""

    @classmethod
    def open(cls, path: Path) -> "GgufWeights":
        return cls(read_gguf(path))

    def has(self, name: str) -> bool:
        return name in self._tensors or self._is_split(name)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in a float type."""
        if name not in self._tensors and self._is_split(name):
            return self._joined(name, shape)
        matrix = self._take(name, shape)
        floats = dequantize(matrix).view(shape) if isinstance(matrix, BlockMatrix) else matrix
        if self._tensors[name].part == _DECAYS:
            return floats.float().neg().log()
        return floats - 1 if self._has_unit_offset(name) else floats

    def take_bytes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        raise CheckpointError(f"{self._path}: tensor {name} was asked for as bytes, which GGUF does not store apart")

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        """GGUF stores every matrix as [outputs, inputs], `transposed` or not."""
        if self._is_split(f"{name}.weight"):
            return LinearWeight(self.take(f"{name}.weight", shape))
        if name.endswith(_DELTA_NET) and f"{name}.weight" not in self._tensors:
            return LinearWeight(self._delta_net(name, shape))
        weight = self._take(f"{name}.weight", shape)
        return LinearWeight(weight, self.take(f"{name}.bias", shape[:1]) if bias else None)

    def release(self, tensor: Tensor) -> None:
        any(mapped.release_tensor(tensor) for mapped in self._mapped.values())

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Raise `CheckpointError` if tensors were never taken, unless a pattern of `ignored` matches their names."""
        patterns = [re.compile(pattern) for pattern in ignored]
        left = [
            f"{tensor.stored_as} ({name})" if tensor.stored_as != name else name
            for name, tensor in self._tensors.items()
            if name not in self._taken and not any(pattern.search(name) for pattern in patterns)
        ]
        if left:
            raise CheckpointError(
                f"{self._path}: {len(left)} tensors are not part of the {self._family.architecture} that its metadata "
                f"describe: {name_some(sorted(left))}; expected only the {len(self._taken)} that were loaded"
            )

    def _take(self, name: str, shape: tuple[int, ...]) -> Table:
        named = self._tensors.get(name)
        if named is None:
            raise CheckpointError(
                f"{self._path}: tensor {name} of shape {list(shape)} is missing; {self._similar(name)}"
            )
        found = tuple(size for size in named.shape if size > 1)
        if found != tuple(size for size in shape if size > 1):
            raise CheckpointError(
                f"{named.tensor.file}: tensor {named.stored_as} has shape {list(named.shape)}, expected {list(shape)} "
                "by the metadata"
            )
        self._taken.add(name)
        matrix = self._view(named, shape)
        order = self._row_orders.get(named.part)
        if order is None:
            return matrix
        return matrix.select_rows(order) if isinstance(matrix, BlockMatrix) else matrix[order]

    def _delta_net(self, name: str, shape: tuple[int, int]) -> Table:
        """Queries, keys and values of all heads, and their gates in a tensor of their own -> key head by key head."""
        prefix, scope = f"{self._file.architecture}.ssm.", name.removesuffix("qkvz")
        key_heads, key_dim = (self._file.integer(prefix + key) for key in ("group_count", "state_size"))
        inner = self._file.integer(f"{prefix}inner_size")
        sizes = (key_heads * key_dim, key_heads * key_dim, inner, inner)
        if sum(sizes) != shape[0] or inner % key_heads:
            raise self._file.refusal(f"{prefix}inner_size", f"{key_heads} (ssm.group_count) times a number of values")
        mixed = self._take(f"{scope}qkv.weight", (shape[0] - inner, shape[1]))
        gates = self._take(f"{scope}z.weight", (inner, shape[1]))
        heads = [rows.view(key_heads, -1) for rows in torch.arange(shape[0]).split(sizes)]
        order = torch.cat(heads, dim=1).flatten()
        if isinstance(mixed, BlockMatrix) and isinstance(gates, BlockMatrix) and mixed.type_name == gates.type_name:
            return BlockMatrix(torch.cat((mixed.rows, gates.rows))[order], mixed.type_name)
        floats = [dequantize(each) if isinstance(each, BlockMatrix) else each.float() for each in (mixed, gates)]
        return torch.cat(floats)[order]

    def _is_split(self, name: str) -> bool:
        """Whether the file has a projection of latents to keys and values in two parts."""
        return name.endswith(_LATENT_UP) and self._tensors.keys() >= set(self._halves(name))

    @staticmethod
    def _halves(name: str) -> tuple[str, str]:
        scope = name.removesuffix(_LATENT_UP)
        return f"{scope}k_b_proj.weight", f"{scope}v_b_proj.weight"

    def _joined(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Keys lie as [heads, latent, size] and values as [heads, size, latent]; the original has each head's rows."""
        keys, values = (self.take(half, self._tensors[half].shape) for half in self._halves(name))
        if keys.dim() != 3 or values.dim() != 3 or (keys.shape[0], keys.shape[1]) != (values.shape[0], values.shape[2]):
            raise CheckpointError(
                f"{self._path}: attn_k_b and attn_v_b of {name} have shapes {list(keys.shape)} and "
                f"{list(values.shape)}; expected [heads, latent, size] and [heads, size, latent]"
            )
        joined = torch.cat((keys.float().transpose(1, 2), values.float()), dim=1).flatten(0, 1)
        if tuple(joined.shape) != shape:
            raise CheckpointError(f"{self._path}: {name} has shape {list(joined.shape)}, expected {list(shape)}")
        return joined

    def _view(self, named: NamedTensor, shape: tuple[int, ...]) -> Table:
        tensor = named.tensor
        begin = tensor.begin
        if tensor.file not in self._mapped:
            self._mapped[tensor.file] = MappedFile(tensor.file)
        mapped = self._mapped[tensor.file]
        num_bytes = tensor.end - tensor.begin
        if named.index is not None:
            num_bytes //= tensor.shape[0]
            begin += named.index * num_bytes
        if tensor.block.is_float:
            return mapped.take(_FLOATS[tensor.block.name], shape, begin)
        row_bytes = shape[-1] // tensor.block.num_values * tensor.block.num_bytes
        if named.index is None:
            return BlockMatrix(mapped.take(torch.uint8, (num_bytes // row_bytes, row_bytes), begin), tensor.block.name)
        # Experts are views of one tensor, so that they are known to lie side by side.
        whole = self._stacks.get((tensor.file, tensor.begin))
        if whole is None:
            whole = mapped.take(torch.uint8, (tensor.shape[0], num_bytes // row_bytes, row_bytes), tensor.begin)
            self._stacks[tensor.file, tensor.begin] = whole
        return BlockMatrix(whole[named.index], tensor.block.name)

    def _has_unit_offset(self, name: str) -> bool:
        part = self._tensors[name].part
        return self._family.unit_offset and part.endswith(_NORMS) and part not in _OTHER_NORMS

    def _similar(self, name: str) -> str:
        """Tensors that the file has near a missing one."""
        scope = name.rsplit(".", 2)[0] + "."
        found = sorted(other for other in self._tensors if other.startswith(scope))
        if found:
            return f"under {scope} it has {name_some(found)}"
        return f"its {len(self._tensors)} tensors include {name_some(sorted(self._tensors))}"


def row_orders(file: GgufFile, row_order: str) -> dict[str, Tensor]:
    """For each part whose rows were reordered, the stored rows in the original order."""
    prefix = f"{file.architecture}."
    num_heads = file.integer(f"{prefix}attention.head_count")
    num_kv_heads = file.integer(f"{prefix}attention.head_count_kv", num_heads)
    hidden = file.integer(f"{prefix}embedding_length")
    head_dim = file.integer(f"{prefix}attention.key_length", max(1, hidden // num_heads))
    if row_order == "pairs":
        return {"attn_q": _halves_first(num_heads, head_dim), "attn_k": _halves_first(num_kv_heads, head_dim)}
    if row_order == "groups" and num_kv_heads > 1 and num_heads % num_kv_heads == 0:
        return {"attn_qkv": _by_kv_head(num_heads, num_kv_heads, head_dim)}
    return {}


def _halves_first(num_heads: int, head_dim: int) -> Tensor:
    """Rows 2 i and 2 i + 1 of a head are i and i + head_dim / 2 of the original."""
    return torch.arange(num_heads * head_dim).view(num_heads, -1, 2).transpose(1, 2).flatten()


def _by_kv_head(num_heads: int, num_kv_heads: int, head_dim: int) -> Tensor:
    """All queries, all keys and all values become the queries, the key and the value of each KV head."""
    sizes = (num_heads, num_kv_heads, num_kv_heads)
    parts = torch.arange(sum(sizes) * head_dim).split([size * head_dim for size in sizes])
    return torch.cat([part.view(num_kv_heads, -1) for part in parts], dim=1).flatten()
