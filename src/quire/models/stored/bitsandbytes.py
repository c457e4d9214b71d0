"""bitsandbytes' 4 bits: the matrix flattened, the first of two codes in the high half of a byte, a scale for each block
of the flat numbers. Scales may be quantised themselves (nested)."""

import json
from typing import Any

import torch
from torch import Tensor

from quire.kernels.coded import CodedMatrix
from quire.models.stored.tensors import LayerTensors
from quire.quantization.stored import Scheme

_STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_MAX_STATE_BYTES = 4096
_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)


def read_bnb_4bit(layer: LayerTensors, scheme: Scheme) -> CodedMatrix | Tensor:
    """Floats where blocks go over the ends of rows."""
    num_outputs, num_inputs = layer.shape
    state = _state(layer)
    block = state["blocksize"]
    count = num_outputs * num_inputs
    packed = layer.take("weight", (-(-count // 2), 1), ("U8",)).flatten()
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:count]
    levels = layer.finite("weight.quant_map", layer.take("weight.quant_map", (16,), ("F32",)))
    scales = _scales(layer, state, -(-count // block))
    if num_inputs % block:
        values = levels[codes.int()] * scales.repeat_interleave(block)[:count]
        return values.view(num_outputs, num_inputs)
    return CodedMatrix(codes.view(num_outputs, num_inputs), scales.view(num_outputs, -1), block, tuple(levels.tolist()))


def _state(layer: LayerTensors) -> dict[str, Any]:
    """The object that describes the tensors, checked."""
    end = next((each for each in _STATES if layer.has(each)), _STATES[0])
    shape = layer.shape_of(end)
    if len(shape) == 1 and shape[0] > _MAX_STATE_BYTES:
        raise layer.error(end, f"has {shape[0]} bytes; at most {_MAX_STATE_BYTES} are read")
    content = layer.take(end, shape, ("U8",)).flatten().numpy().tobytes()
    try:
        state = json.loads(content.decode())
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise layer.error(end, "is not a JSON object; fetch the file again")
    nested = state.get("nested_blocksize", 0)
    for key, value, supported in (
        ("blocksize", state.get("blocksize"), _BLOCKS),
        ("nested_blocksize", nested, (0, *_BLOCKS)),
        ("shape", state.get("shape"), (list(layer.shape),)),
    ):
        if isinstance(value, bool) or value not in supported:
            raise layer.error(end, f"has {key} {str(value)[:80]}; supported: {', '.join(map(str, supported))}")
    offset = state.get("nested_offset", 0.0)
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < 1e30:
        raise layer.error(end, f"has nested_offset {str(offset)[:80]}; supported: a finite number")
    return state


def _scales(layer: LayerTensors, state: dict[str, Any], num_blocks: int) -> Tensor:
    """[blocks] float32."""
    if not layer.has("weight.nested_absmax"):
        return layer.finite("weight.absmax", layer.take("weight.absmax", (num_blocks,), ("F32",)))
    codes = layer.take("weight.absmax", (num_blocks,), ("U8",))
    levels = layer.take("weight.nested_quant_map", (256,), ("F32",))
    block = state.get("nested_blocksize", 0)
    if not block:
        raise layer.error("weight.nested_absmax", "has no nested_blocksize in the layer's quant_state")
    largest = layer.take("weight.nested_absmax", (-(-num_blocks // block),), ("F32",))
    scales = levels[codes.int()] * largest.repeat_interleave(block)[:num_blocks] + state.get("nested_offset", 0.0)
    return layer.finite("weight.nested_absmax", scales)
