"""AdapterRegistry: the adapters that have a name, and what identifies them. No torch."""

import json
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from quire.errors import CheckpointError, ConfigError
from quire.lora.adapter_config import CONFIG_FILE
from quire.lora.adapter_folder import TENSORS_FILE, AdapterFolder

MAX_ADAPTERS = 100_000
"""Names that may be registered at once."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as a request names it to the engine."""

    digest: str
    """Hash of its content."""
    path: str


class AdapterRegistry:
    """Names of adapters → their folders. Safe to use from several threads."""

    def __init__(self, modules: Iterable[str] = (), *, enabled: bool = True) -> None:
        """`enabled`: the engine serves adapters. `modules` are name=path, or JSON with name and path as vLLM takes it.
        Raises `ConfigError` for text that is neither, `CheckpointError` for a folder whose adapter cannot be served."""
        self.enabled = enabled
        self._paths: dict[str, str] = {}
        self._digests: dict[str, tuple[tuple[int, ...], str]] = {}
        """Path → the state of its files and the digest that they had then."""
        self._lock = threading.Lock()
        for name, path in map(parse_module, modules):
            if name in self._paths:
                raise ConfigError(f"lora_modules names {name!r} twice; give each adapter a name of its own")
            self.add(name, path)

    @property
    def names(self) -> list[str]:
        return list(self._paths)

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def add(self, name: str, path: str) -> None:
        """Register a folder under a name, in the place of one of that name. Raises `CheckpointError`."""
        folder = AdapterFolder.open(path)
        if len(self._paths) >= MAX_ADAPTERS and name not in self._paths:
            raise CheckpointError(f"{MAX_ADAPTERS:,} adapters are registered, which is the limit; unload one")
        self._paths[name] = str(folder.path.absolute())

    def remove(self, name: str) -> None:
        self._paths.pop(name, None)

    def find(self, name: str) -> Adapter:
        """The adapter of that name, as its files are now."""
        return self.identify(self._path_of(name))

    def known(self, name: str) -> Adapter | None:
        """The adapter of that name if its files have not changed since they were read; None: `find` must read them.
        Raises `CheckpointError`."""
        path = self._path_of(name)
        found = self._digests.get(path)
        return Adapter(found[1], path) if found is not None and found[0] == _state_of(path) else None

    def _path_of(self, name: str) -> str:
        path = self._paths.get(name)
        if path is None:
            raise CheckpointError(f"no adapter named {name!r} is loaded any more")
        return path

    def identify(self, path: str) -> Adapter:
        """The adapter in a folder, as its files are now; they are read where they have changed. Raises
        `CheckpointError`."""
        path = os.path.abspath(os.path.expanduser(path))
        if not (Path(path) / CONFIG_FILE).is_file():
            AdapterFolder.open(path)  # says what is wrong
        state = _state_of(path)
        with self._lock:
            known = self._digests.get(path)
        if known is not None and known[0] == state:
            return Adapter(known[1], path)
        digest = AdapterFolder.open(path).digest()
        with self._lock:
            if len(self._digests) >= MAX_ADAPTERS:
                self._digests.clear()
            self._digests[path] = (state, digest)
        return Adapter(digest, path)


def parse_module(text: str) -> tuple[str, str]:
    """name=path, or {"name": …, "path": …} -> both. Raises `ConfigError`."""
    given: object = text.partition("=")[::2]
    if text.lstrip().startswith("{"):
        try:
            read = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"lora_modules is {text!r}, which is not JSON: {error}") from None
        given = (read.get("name"), read.get("path"))
    match given:
        case (str(name), str(path)) if name.strip() and path:
            return name.strip(), path
    raise ConfigError(f"lora_modules is {text!r}; give name=path, such as sql=adapters/sql")


def _state_of(path: str) -> tuple[int, ...]:
    """What changes when the files do. Raises `CheckpointError`."""
    state: list[int] = []
    for name in (CONFIG_FILE, TENSORS_FILE):
        try:
            found = os.stat(Path(path) / name)
        except OSError as error:
            raise CheckpointError(f"adapter {path!r} cannot be read: {name}: {error.strerror}") from None
        state += (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return tuple(state)
