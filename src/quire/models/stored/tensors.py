"""LayerTensors: the tensors that a checkpoint has for one dense layer, taken by the end of their names and checked."""

from dataclasses import dataclass

from torch import Tensor

from quire.errors import CheckpointError
from quire.models.safetensors_weights import SafetensorsWeights

INT32 = ("I32", "U32")
SCALES = ("F32", "F16", "BF16")
FLOAT8 = ("F8_E4M3",)


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """The tensors of the layer `name` of `shape` [outputs, inputs]."""

    source: SafetensorsWeights
    name: str
    shape: tuple[int, int]

    def has(self, end: str) -> bool:
        return self.source.has(f"{self.name}.{end}")

    def shape_of(self, end: str) -> tuple[int, ...]:
        """Shape of a tensor; that of nothing where it is missing, so that taking it says so."""
        return self.source.shape_of(f"{self.name}.{end}") if self.has(end) else ()

    def dtype_of(self, end: str) -> str:
        """The file's name for the type of a tensor; empty where it is missing."""
        return self.source.dtype_of(f"{self.name}.{end}") if self.has(end) else ""

    def take(self, end: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Tensor:
        """Raises `CheckpointError` for a tensor that is missing, misshapen or of another type."""
        return self.source.take_as(f"{self.name}.{end}", shape, dtypes)

    def skip(self, *ends: str) -> None:
        """Tensors that this layer may have and that nothing is computed from."""
        self.source.skip(f"{self.name}.{end}" for end in ends)

    def finite(self, end: str, tensor: Tensor) -> Tensor:
        """`tensor`, which is the one of that end. Raises `CheckpointError` for infinities and NaN."""
        if not bool(tensor.float().isfinite().all()):
            raise self.error(end, "has numbers that are not finite; fetch the file again")
        return tensor

    def error(self, end: str, fault: str) -> CheckpointError:
        return CheckpointError(f"tensor {self.name}.{end} {fault}")

    def groups(self, group_size: int) -> int:
        """Groups of the layer's inputs."""
        return -(-self.shape[1] // group_size)
