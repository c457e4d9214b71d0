"""AdapterFolder: an adapter as peft stores it, adapter_config.json and adapter_model.safetensors.

Opening one reads the config and the header of the tensors, and checks both against each other. Whether it fits a model
is checked where it is loaded (`quire.lora.slots`). No torch.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quire.errors import CheckpointError
from quire.lora.adapter_config import CONFIG_FILE, AdapterConfig
from quire.model_config.folder_kinds import name_some
from quire.models.safetensors_file import Entry, read_header

TENSORS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FLOATS = ("F32", "F16", "BF16")
_READ_BYTES = 1 << 20


@dataclass(slots=True)
class ModuleTensors:
    """The tensors of one module, by their roles: A and B of a low-rank update, of a dense layer or an embedding, and
    the magnitudes of DoRA; or the whole weight."""

    a: Entry | None = None
    """[rank, inputs]; of an embedding [rank, vocabulary]."""
    b: Entry | None = None
    """[outputs, rank]"""
    magnitude: Entry | None = None
    """[outputs]"""
    weight: Entry | None = None
    """What replaces the module's weight."""
    is_embedding: bool = False


_ROLES = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
    ".lora_magnitude_vector": ("magnitude", False),
    ".lora_magnitude_vector.weight": ("magnitude", False),
    ".base_layer.weight": ("", False),
    ".weight": ("weight", False),
}
"""End of a tensor's name → its role and whether it belongs to an embedding. peft stores the base weight of an embedding
beside the update; it is the model's own and not read."""


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A checked folder."""

    path: Path
    config: AdapterConfig
    modules: Mapping[str, ModuleTensors] = field(repr=False)
    """By the name of the module in the base model."""

    @classmethod
    def open(cls, path: str | Path) -> "AdapterFolder":
        """Raises `CheckpointError` for a folder that holds no adapter, is damaged or asks for what is not supported."""
        path = Path(os.path.expanduser(path))
        if not path.is_dir():
            raise CheckpointError(
                f"adapter {str(path)!r} is not a folder; give one with {CONFIG_FILE}, as peft writes it"
            )
        _check_files(path)
        config = AdapterConfig.read(path)
        modules = _sort(path, read_header(path / TENSORS_FILE)[0])
        for name, module in modules.items():
            _check_module(path / TENSORS_FILE, name, module, config)
        return cls(path, config, modules)

    @property
    def max_rank(self) -> int:
        return max((module.a.shape[0] for module in self.modules.values() if module.a is not None), default=0)

    def digest(self) -> str:
        """The adapter's identity: a hash of its config and its tensors."""
        return digest_of(self.path)


def digest_of(path: Path) -> str:
    """A hash of the bytes of config and tensors in an adapter's folder. Raises `CheckpointError`."""
    digest = hashlib.blake2b(digest_size=20)
    try:
        for name in (CONFIG_FILE, TENSORS_FILE):
            file = path / name
            digest.update(b"%d\x00" % file.stat().st_size)
            with file.open("rb") as stream:
                while piece := stream.read(_READ_BYTES):
                    digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"adapter {str(path)!r} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _check_files(path: Path) -> None:
    for name in (CONFIG_FILE, TENSORS_FILE):
        if (path / name).is_file():
            continue
        found = sorted(file.name for file in path.iterdir())
        advice = "; give the folder that peft's save_pretrained wrote"
        if name == TENSORS_FILE and "adapter_model.bin" in found:
            advice = "; loading pickled files can run code: load the adapter with peft and save it again"
        raise CheckpointError(
            f"adapter {str(path)!r} has no {name}; found {name_some(found) if found else 'nothing'}{advice}"
        )


def _sort(path: Path, entries: Mapping[str, Entry]) -> dict[str, ModuleTensors]:
    """Tensors by module and role. Raises `CheckpointError` for one that has none."""
    modules: dict[str, ModuleTensors] = {}
    for name, entry in entries.items():
        end = next((end for end in _ROLES if name.endswith(end)), None)
        if end == ".weight" and ".lora_" in name:
            end = None  # of an update, in another layout
        if end is None or not name.startswith(_PREFIX) or len(name) <= len(_PREFIX) + len(end):
            raise CheckpointError(
                f"{path / TENSORS_FILE}: tensor {name[:200]} is not supported; there are lora_A and lora_B of dense "
                "layers and embeddings, lora_magnitude_vector, and whole weights of modules_to_save"
            )
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"{path / TENSORS_FILE}: tensor {name[:200]} is {entry.dtype}; there is {', '.join(_FLOATS)}"
            )
        role, is_embedding = _ROLES[end]
        if not role:
            continue
        module = modules.setdefault(name.removeprefix(_PREFIX).removesuffix(end), ModuleTensors())
        if getattr(module, role) is not None:
            raise CheckpointError(f"{path / TENSORS_FILE}: tensor {name[:200]} is there twice under two names")
        setattr(module, role, entry)
        module.is_embedding = module.is_embedding or is_embedding
    return modules


def _check_module(file: Path, name: str, module: ModuleTensors, config: AdapterConfig) -> None:
    """Raise `CheckpointError` unless the tensors of a module are what the config says."""
    if module.weight is not None:
        if module.a or module.b or module.magnitude:
            raise CheckpointError(f"{file}: {name[:200]} has both a whole weight and an update of it; save one")
        return
    a, b = module.a, module.b
    if a is None or b is None:
        raise CheckpointError(
            f"{file}: {name[:200]} has no {'lora_A' if a is None else 'lora_B'}; save the adapter again"
        )
    if not config.changes(name):
        raise CheckpointError(
            f"{file}: {name[:200]} has an update, but {CONFIG_FILE} leaves that module out (target_modules, "
            "exclude_modules, layers_to_transform); give the config that was saved with it"
        )
    rank = config.rank_of(name)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{file}: {name[:200]} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; {CONFIG_FILE} gives it rank "
            f"{rank}, which is [{rank}, inputs] and [outputs, {rank}]"
        )
    if config.uses_dora and module.is_embedding:
        raise CheckpointError(
            f"{file}: {name[:200]} is an embedding, and use_dora is true; DoRA serves dense layers only"
        )
    if config.uses_dora != (module.magnitude is not None):
        state = "no lora_magnitude_vector, but use_dora is true" if config.uses_dora else "a magnitude without use_dora"
        raise CheckpointError(f"{file}: {name[:200]} has {state}; give the config that was saved with it")
    if module.magnitude is not None and module.magnitude.shape != (b.shape[0],):
        raise CheckpointError(
            f"{file}: {name[:200]} has a magnitude {list(module.magnitude.shape)}; lora_B gives [{b.shape[0]}]"
        )
