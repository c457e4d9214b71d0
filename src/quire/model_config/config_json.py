"""ConfigJson: config.json with its defaults, read key by key; and how any JSON file of a checkpoint is read."""

import json
from pathlib import Path
from typing import Any

from quire.errors import CheckpointError
from quire.model_config.architectures import ARCHITECTURES


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises `CheckpointError` where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
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
        self._path = path
        self.architecture = self._find_architecture(config)
        row = ARCHITECTURES[self.architecture]
        self._names, self._meanings = row.names, row.meanings
        if row.section:
            text = config.get(row.section)
            if not isinstance(text, dict):
                raise self.refusal(row.section, text, "an object that describes the text model")
            # What the whole file says, of its end tokens for one, goes before what the section repeats.
            config = {**text, **{key: value for key, value in config.items() if value is not None}}
        for spelling, name in row.aliases.items():
            if spelling in config:
                config = {name: config[spelling], **config}
        self._config = {**row.implied, **config, **_nested(config)}
        for key, supported in row.fixed.items():
            value = self._config.get(key, supported)
            if (bool(value) if isinstance(supported, bool) else value) != supported:
                raise self.refusal(key, value, json.dumps(supported))
        quantization = self._config.get("quantization_config")
        if quantization and not _holds_only_kv_scales(quantization):
            method = quantization.get("quant_method", "unnamed")
            if method not in row.quantizations:
                known = ", ".join(("float32, float16 and bfloat16 weights", *row.quantizations))
                raise self.refusal("quantization_config", method, known + _advice(method))

    def value(self, key: str) -> Any:
        """The value, or what the family means by it; None if it is missing."""
        value = self._config.get(self._names.get(key, key))
        meanings = self._meanings.get(key)
        return meanings.get(value, value) if meanings and isinstance(value, str) else value

    def flag(self, key: str, default: bool = False) -> bool:
        """False for null, `default` for a missing key."""
        return bool(self._config.get(self._names.get(key, key), default))

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.value(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refusal(key, value, f"an integer of at least {minimum}")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number; `default` for null or a missing key."""
        value = self.value(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
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
        shown = "missing" if value is None else json.dumps(value)
        return CheckpointError(f"{self._path}: {key} is {shown}; supported: {supported}")

    def _find_architecture(self, config: dict[str, Any]) -> str:
        named = config.get("architectures") or []
        for name in named:
            if name in ARCHITECTURES:
                return str(name)
        found = ", ".join(map(str, named)) or f"none (model_type {config.get('model_type')!r})"
        supported = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{self._path}: architectures is {found}; supported are {supported}")


def _nested(config: dict[str, Any]) -> dict[str, Any]:
    """The values of the objects in a config as "object.key"."""
    objects = {name: value for name, value in config.items() if isinstance(value, dict)}
    return {f"{name}.{key}": value for name, inner in objects.items() for key, value in inner.items()}


def _advice(method: str) -> str:
    """What to do with a checkpoint of this method."""
    if method != "fp8":
        return ""
    return (
        ". Convert it to bfloat16 once (DeepSeek publishes fp8_cast_bf16.py) and delete quantization_config; then "
        "--quantization int8 or int4 stores its weights in few bits"
    )


def _holds_only_kv_scales(quantization: dict[str, Any]) -> bool:
    """Whether the weights are floats as usual, and only scales of an 8-bit float KV cache lie beside them."""
    scheme = quantization.get("kv_cache_scheme") or {}
    return (
        quantization.get("quant_method") == "compressed-tensors"
        and not quantization.get("config_groups")
        and (scheme.get("type"), scheme.get("num_bits"), bool(scheme.get("dynamic"))) == ("float", 8, False)
    )
