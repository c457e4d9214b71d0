"""STORED_FORMATS: the formats of few bits that checkpoints come in, by their `quant_method`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quire.errors import CheckpointError
from quire.quantization.stored.awq import read_awq
from quire.quantization.stored.bitsandbytes import read_bitsandbytes
from quire.quantization.stored.compressed_tensors import read_compressed_tensors
from quire.quantization.stored.fields import Fields, shown
from quire.quantization.stored.fp8 import read_fp8
from quire.quantization.stored.gptq import read_gptq
from quire.quantization.stored.mlx import read_mlx
from quire.quantization.stored.scheme import StoredWeights
from quire.quantization.stored.torchao import read_torchao

STORED_FORMATS: Mapping[str, Callable[[Fields], StoredWeights]] = MappingProxyType(
    {
        "gptq": read_gptq,
        "awq": read_awq,
        "compressed-tensors": read_compressed_tensors,
        "fp8": read_fp8,
        "bitsandbytes": read_bitsandbytes,
        "torchao": read_torchao,
    }
)
"""What reads a format's config. Raises `CheckpointError` for what is not supported."""

FAMILY_FORMATS = ("mxfp4",)
"""Formats that a family's class reads by itself."""

_NAMES = ("quantization_config", "compression_config")
"""Keys of config.json; the second is that of old files of compressed-tensors."""


def read_stored_weights(
    path: Path, config: dict[str, Any], beside: dict[str, Any] | None = None
) -> StoredWeights | None:
    """How the checkpoint of a config.json at `path` stores its layers; None: in floats, or as a family knows itself.

    `beside` is quantize_config.json, which old files of GPTQ and AWQ have in place of a key of config.json.
    """
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx:
        return read_mlx(Fields(path, "quantization", mlx))
    name = next((each for each in _NAMES if config.get(each) is not None), None)
    if name is None:
        if beside is None:
            return None
        fields = Fields(path.with_name("quantize_config.json"), "quantize_config", beside)
        method = beside.get("quant_method", "awq" if "w_bit" in beside else "gptq")
    else:
        fields = Fields(path, name, config[name])
        method = _method(fields.values)
    if method == "compressed-tensors" and _holds_only_kv_scales(fields):
        return None
    if method in FAMILY_FORMATS:
        return None
    reader = STORED_FORMATS.get(method) if isinstance(method, str) else None
    if reader is None:
        known = ", ".join(("floats", *STORED_FORMATS, *FAMILY_FORMATS))
        key = fields.name if isinstance(method, str) else f"{fields.name}.quant_method"
        raise CheckpointError(f"{fields.path}: {key} is {shown(method)}; supported: {known}")
    return reader(fields)


def _method(values: dict[str, Any]) -> object:
    """The name of the format; files before it had one are known by their keys."""
    if "quant_method" in values:
        return values["quant_method"]
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in values else None


def _holds_only_kv_scales(config: Fields) -> bool:
    """Whether the weights are floats as usual, and only scales of an 8-bit float KV cache lie beside them."""
    scheme = config.optional("kv_cache_scheme")
    if config.values.get("config_groups") or scheme is None:
        return False
    values = scheme.values
    return (values.get("type"), values.get("num_bits"), bool(values.get("dynamic"))) == ("float", 8, False)
