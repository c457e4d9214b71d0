"""LAYOUTS: the ways in which the tensors of a dense layer lie in checkpoints of few bits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from quire.kernels.coded import CodedMatrix
from quire.models.stored.awq import read_awq_gemm, read_awq_gemv
from quire.models.stored.bitsandbytes import read_bnb_4bit
from quire.models.stored.gptq import read_gptq_v1, read_gptq_v2
from quire.models.stored.mlx import read_mlx
from quire.models.stored.packed_int32 import read_mxfp4, read_nvfp4, read_packed_int32
from quire.models.stored.scaled import read_bnb_8bit, read_mxfp8, read_scaled_float, read_scaled_int
from quire.models.stored.tensors import LayerTensors
from quire.models.stored.torchao import CODES, read_torchao
from quire.quantization.stored import Scheme


@dataclass(frozen=True, slots=True)
class Layout:
    """A row of LAYOUTS."""

    read: Callable[[LayerTensors, Scheme], CodedMatrix | Tensor]
    """The matrix, or its floats where its codes cannot be kept. Raises `CheckpointError` for tensors that do not fit
    the scheme."""
    codes: str = "weight"
    """The end of the name of the tensor of codes."""


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "gptq_v1": Layout(read_gptq_v1, "qweight"),
        "gptq_v2": Layout(read_gptq_v2, "qweight"),
        "awq_gemm": Layout(read_awq_gemm, "qweight"),
        "awq_gemv": Layout(read_awq_gemv, "qweight"),
        "packed_int32": Layout(read_packed_int32, "weight_packed"),
        "nvfp4": Layout(read_nvfp4, "weight_packed"),
        "mxfp4": Layout(read_mxfp4, "weight_packed"),
        "scaled_int": Layout(read_scaled_int),
        "scaled_float": Layout(read_scaled_float),
        "mxfp8": Layout(read_mxfp8),
        "fp8": Layout(read_scaled_float),
        "bnb_4bit": Layout(read_bnb_4bit),
        "bnb_8bit": Layout(read_bnb_8bit),
        "mlx": Layout(read_mlx),
        "torchao": Layout(read_torchao, CODES),
    }
)
