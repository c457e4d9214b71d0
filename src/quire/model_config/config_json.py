"""ConfigJson: config.json with its defaults, read key by key; and how any JSON file of a checkpoint is read."""

import json
from pathlib import Path
from typing import Any

from quire.errors import CheckpointError
from quire.model_config.architecture import Architecture
from quire.model_config.architecture_names import find_architecture
from quire.model_config.architectures import ARCHITECTURES
from quire.model_config.family_keys import keys_of_family, reads
from quire.model_config.file_kinds import describe_content, is_file
from quire.model_config.vision_architectures import TEXT_MODELS, with_text_model
from quire.quantization.stored import FAMILY_FORMATS, STORED_FORMATS, StoredWeights, read_stored_weights

_MAX_JSON_BYTES = 256 << 20
_LARGEST_INTEGER = 2**40
_LARGEST_FLOAT = 1e38
_NUM_SHOWN = 200
"""Characters of a value that a message shows."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises `CheckpointError` where it is not one."""
    try:
        reason = describe_content(path) if is_file(path) else None
        if reason is not None:
            raise CheckpointError(f"{path} {reason}")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; at most {_MAX_JSON_BYTES:,} are read")
        value = json.loads(path.read_bytes().decode("utf-8-sig"))  # editors on Windows begin with a mark
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read as JSON: its lists and objects are nested too deep") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


class ConfigJson:
    """config.json over the defaults of its family. A key is looked up by the family's spelling, which may be
    "object.key", a key of an object in it.

    Every refusal is a `CheckpointError` that names the file, the key, the value, and what is supported.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.architecture = find_architecture(path, config)
        row = ARCHITECTURES[self.architecture]
        self._row, self._names, self._meanings = row, row.names, row.meanings
        if row.section:
            text = config.get(row.section, {} if row.text_model else None)  # some files are flat
            if not isinstance(text, dict):
                raise self.refusal(row.section, text, "an object that describes the text model")
            row = self._with_text_model(row, text)
            # What the whole file says, of its end tokens for one, goes before what the section repeats.
            tied = {"tie_word_embeddings": True} if row.vision and text.get("tie_word_embeddings") is True else {}
            config = {**text, **{key: value for key, value in config.items() if value is not None}, **tied}
        config = keys_of_family(row, config)
        for spelling, name in row.aliases.items():
            if spelling in config:
                config = {name: config[spelling], **config}
        self._config = {**row.implied, **config, **_nested(config), **row.constants}
        for key, supported in row.fixed.items():
            value = self._config.get(key, supported)
            if (bool(value) if isinstance(supported, bool) else value) != supported:
                raise self.refusal(key, value, json.dumps(supported))
        self.stored = self._read_stored()
        """How dense layers are stored in few bits; None: in floats."""

    def _read_stored(self) -> StoredWeights | None:
        beside = self.path.with_name("quantize_config.json")
        stored = read_stored_weights(self.path, self._config, read_json(beside) if beside.is_file() else None)
        method = self.object("quantization_config").get("quant_method")
        if method in FAMILY_FORMATS and method not in self._row.quantizations:
            raise self.refusal("quantization_config", method, ", ".join(("floats", *STORED_FORMATS)))
        return stored

    def _with_text_model(self, row: Architecture, text: dict[str, Any]) -> Architecture:
        """The row with what the row of its text model reads, where the section names it."""
        if not row.text_model:
            return row
        model_type = text.get("model_type", row.text_model)
        if model_type not in TEXT_MODELS:
            raise self.refusal(f"{row.section}.model_type", model_type, ", ".join(TEXT_MODELS))
        name, implied = TEXT_MODELS[model_type]
        self._row = row = with_text_model(row, ARCHITECTURES[name], implied)
        self._names, self._meanings = row.names, row.meanings
        return row

    @property
    def vision(self) -> str:
        """The family of the image encoder; empty for a model that reads text only."""
        return self._row.vision

    def reads(self, key: str) -> bool:
        """Whether the family reads a key that some families do not."""
        return reads(self._row, self._names.get(key, key))

    def value(self, key: str) -> Any:
        """The value, or what the family means by it; None if it is missing."""
        value = self._config.get(self._names.get(key, key))
        meanings = self._meanings.get(key)
        return meanings.get(value, value) if meanings and isinstance(value, str) else value

    def flag(self, key: str, default: bool = False) -> bool:
        """False for null, `default` for a missing key."""
        value = self._config.get(self._names.get(key, key), default)
        if value not in (None, False, True) or isinstance(value, float):
            raise self.refusal(key, value, "true or false")
        return bool(value)

    def object(self, key: str) -> dict[str, Any]:
        """An object of config.json; empty for null or a missing key."""
        value = self.value(key)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(key, value, "an object")
        return value or {}

    def integer(
        self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = _LARGEST_INTEGER
    ) -> int:
        """An integer; `default` for null or a missing key."""
        value = self.value(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refusal(key, value, f"an integer of at least {minimum}")
        if value > maximum:
            raise self.refusal(key, value, f"an integer of at most {maximum}")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number; `default` for null or a missing key."""
        value = self.value(key)
        if value is None:
            return default
        if not is_positive(value):
            raise self.refusal(key, value, "a positive number")
        return float(value)

    def choice(self, key: str, supported: tuple[str, ...], default: str | None = None) -> str:
        value = self.value(key)
        value = default if value is None else value
        if value not in supported:
            raise self.refusal(key, value, ", ".join(supported))
        return str(value)

    def refusal(self, key: str, value: Any, supported: str) -> CheckpointError:
        """The error to raise for a value that is not supported."""
        key = self._names.get(key, key)
        shown = "missing" if value is None else _shorten(json.dumps(value))
        return CheckpointError(f"{self.path}: {key} is {shown}; supported: {supported}")


def is_positive(value: object) -> bool:
    """Whether a value of a JSON file is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LARGEST_FLOAT


def _shorten(text: str) -> str:
    return text if len(text) <= _NUM_SHOWN else f"{text[:_NUM_SHOWN]} …"


def _nested(config: dict[str, Any]) -> dict[str, Any]:
    """The values of the objects in a config as "object.key"."""
    objects = {name: value for name, value in config.items() if isinstance(value, dict)}
    return {f"{name}.{key}": value for name, inner in objects.items() for key, value in inner.items()}
