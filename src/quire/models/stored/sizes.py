"""count_kept: the memory of the layers that keep a checkpoint's bits, from the headers of its files. No torch.

estimate_kept says about the same where only config.json is there.

The up-projections of latent attention become floats, as embeddings do, and so do a layer's experts that are not all
stored in one way; they are not counted.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from quire.errors import CheckpointError
from quire.layer_spec import ModelSpec
from quire.model_config import read_json
from quire.models.safetensors_file import Entry, read_header
from quire.quantization.stored import KeptBits, Scheme, StoredWeights

_CODES = ("qweight", "weight_packed", "weight", "_weight_qdata")
_FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
_WIDENED = re.compile(r"kv_b_proj$|embed|\bwte$|\bwpe$")
_EXPERTS = re.compile(r"(.*\.experts)\.\d+\.")
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output)$")
_BYTES_OF_FLOAT32 = 4


def count_kept(folder: Path, stored: StoredWeights) -> KeptBits | None:
    """None where the folder has no safetensors files yet, or damaged ones, which loading reports."""
    try:
        entries = _entries(folder)
    except (OSError, CheckpointError):
        return None
    parameters = num_bytes = head = 0
    mixed = _mixed_experts(entries, stored)
    for layer, codes in _layers(entries):
        scheme = stored.scheme_of(layer)
        if scheme is None or _WIDENED.search(layer) or _experts_of(layer) in mixed:
            continue
        size = _LayerSize(entries, layer, codes, scheme)
        if _HEADS.search(layer):
            head = size.num_bytes
        else:
            parameters += size.num_parameters
            num_bytes += size.num_bytes
    return KeptBits(parameters, num_bytes, head)


def estimate_kept(spec: ModelSpec, stored: StoredWeights) -> KeptBits:
    """The same from config.json alone: every dense layer as most are stored, experts included, the head in floats."""
    scheme, parameters = stored.usual, spec.layer_parameters
    width = 4 if scheme.bits <= 4 else 8
    scales = parameters // scheme.group_of(spec.hidden_size) * 2 * (1 if scheme.symmetric else 2)
    return KeptBits(parameters, parameters * width // 8 + scales)


def _entries(folder: Path) -> Mapping[str, Entry]:
    whole = folder / "model.safetensors"
    if whole.is_file():
        return read_header(whole)[0]
    files = read_json(folder / "model.safetensors.index.json").get("weight_map")
    names = {name for name in files.values() if isinstance(name, str)} if isinstance(files, dict) else set()
    return {
        name: entry
        for file in sorted(names)
        if Path(file).name == file
        for name, entry in read_header(folder / file)[0].items()
    }


def _experts_of(name: str) -> str | None:
    """The scope of all experts that a tensor of one lies in."""
    found = _EXPERTS.match(name)
    return found and found[1]


def _mixed_experts(entries: Mapping[str, Entry], stored: StoredWeights) -> set[str]:
    """Scopes of experts whose matrices are partly floats, or in several schemes."""
    schemes: dict[str, set[Scheme | None]] = {}
    for name, entry in entries.items():
        scope = _experts_of(name)
        layer, _, end = name.rpartition(".")
        if scope is not None and end in _CODES:
            is_float = entry.dtype in _FLOATS
            schemes.setdefault(scope, set()).add(None if is_float else stored.scheme_of(layer))
    return {scope for scope, found in schemes.items() if len(found) > 1}


def _layers(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
    for name, entry in entries.items():
        layer, _, end = name.rpartition(".")
        if end in _CODES and entry.dtype not in _FLOATS and entry.shape and all(entry.shape):
            yield layer, entry


class _LayerSize:
    """What one layer takes once it is packed: codes of 4 or 8 bits, scales, and offsets of the same type."""

    def __init__(self, entries: Mapping[str, Entry], layer: str, codes: Entry, scheme: Scheme) -> None:
        self._entries, self._layer, self._scheme = entries, layer, scheme
        self.num_parameters = (codes.end - codes.begin) * 8 // scheme.bits
        width = 4 if scheme.bits <= 4 else 8
        scales = self._scale_bytes(codes)
        self.num_bytes = self.num_parameters * width // 8 + scales * (1 if scheme.symmetric else 2)

    def _scale_bytes(self, codes: Entry) -> int:
        scheme = self._scheme
        if scheme.layout == "bnb_4bit":
            return self.num_parameters // (scheme.group_size or 1) * _BYTES_OF_FLOAT32
        if scheme.layout == "awq_gemv":
            # Its scales are padded to whole words.
            num_outputs, num_inputs = codes.shape[0], self.num_parameters // codes.shape[0]
            return num_outputs * -(-num_inputs // scheme.group_of(num_inputs)) * 2
        if scheme.layout == "bnb_8bit":
            return codes.shape[0] * _BYTES_OF_FLOAT32
        ends = ("scales", "weight_scale", "weight_scale_inv", "_weight_scale")
        entry = next((found for end in ends if (found := self._entries.get(f"{self._layer}.{end}"))), None)
        if entry is None or not codes.shape:
            return 0
        count, size = math.prod(entry.shape), _FLOATS.get(entry.dtype, 2)
        if scheme.layout == "nvfp4":
            size = _BYTES_OF_FLOAT32
        elif scheme.layout.startswith(("fp8", "scaled", "torchao")) and entry.shape[:1] != codes.shape[:1]:
            # One for the tensor or for each tile; each output gets its own.
            columns = entry.shape[1] if scheme.block is not None and len(entry.shape) == 2 else 1
            count = codes.shape[0] * columns
        return count * size
