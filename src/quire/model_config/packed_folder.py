"""PackedFolder: what PACKED_FILE says, which `quire convert` writes beside config.json. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from quire.errors import CheckpointError
from quire.model_config.config_json import read_json
from quire.quantization import METHODS

PACKED_FILE = "quire_packed.json"
_VERSION = 1
_MOST_FILES = 10_000


@dataclass(frozen=True, slots=True)
class PackedFolder:
    """A folder of packed weights."""

    quantization: str
    """The row of METHODS."""
    packing: int
    """Version of the kernels' layout."""
    files: tuple[str, ...]
    """Names of the safetensors files."""
    layers: frozenset[str]
    """Dense layers whose matrices are packed."""

    @classmethod
    def read(cls, path: Path) -> "PackedFolder":
        """Raises `CheckpointError` for what is missing, damaged or of another version."""
        values = read_json(path)

        def refusal(key: str, supported: str) -> CheckpointError:
            return CheckpointError(f"{path}: {key} is {repr(values.get(key))[:200]}; supported: {supported}")

        if values.get("version") != _VERSION:
            raise refusal("version", f"{_VERSION}; run quire convert again on the original")
        if values.get("quantization") not in tuple(METHODS):
            raise refusal("quantization", ", ".join(METHODS))
        if type(values.get("packing")) is not int:
            raise refusal("packing", "an integer")
        files, layers = values.get("files"), values.get("layers")
        if not _are_names(files) or len(files) > _MOST_FILES or not all(Path(name).name == name for name in files):
            raise refusal("files", f"names of files beside it, {_MOST_FILES:,} at most")
        if not _are_names(layers):
            raise refusal("layers", "names of layers")
        return cls(values["quantization"], values["packing"], tuple(files), frozenset(layers))

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "version": _VERSION,
            "quantization": self.quantization,
            "packing": self.packing,
            "files": list(self.files),
            "layers": sorted(self.layers),
        }


def packed_as(folder: Path) -> str | None:
    """The quantisation by which a folder's weights are packed; None: it holds no packed weights."""
    path = folder / PACKED_FILE
    return PackedFolder.read(path).quantization if path.is_file() else None


def _are_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)
