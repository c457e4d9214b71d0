"""AdapterConfig: adapter_config.json as peft writes it, read and checked.

What Quire does not compute is refused by its name. Matching of modules follows peft: `target_modules` is a list of
suffixes or one regular expression; `rank_pattern` and `alpha_pattern` map expressions to their own values.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from quire.errors import CheckpointError
from quire.lora.patterns import check_pattern
from quire.model_config import read_json

V = TypeVar("V", int, float)

CONFIG_FILE = "adapter_config.json"
_LARGEST_RANK = 2**14
_LARGEST_ALPHA = 2.0**20
_MOST_ENTRIES = 10_000
"""Modules, patterns and layers that a list may hold."""

_WITHOUT_EFFECT = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"),
        *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),
    }
)
"""Keys that decide how an adapter is trained or stored, not what it computes."""
_READ = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    }
)
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model as it is; the others change it, so the adapter alone is not
the model that was trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What an adapter's tensors mean. Names are those of modules of the base model, such as
    `model.layers.0.self_attn.q_proj`."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    uses_rslora: bool
    """The factor is alpha / sqrt(rank), else alpha / rank."""
    uses_dora: bool
    """Rows of the changed weight have magnitudes of their own."""
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    """Indices of the layers it changes; None: all. Counts only beside a list of targets, as in peft."""
    layers_patterns: tuple[str, ...]
    saved_modules: tuple[str, ...]
    """Modules whose whole weight comes with the adapter."""

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Raises `CheckpointError` for a file that is missing or damaged and for what is not supported."""
        path = folder / CONFIG_FILE
        return _Reader(path, read_json(path)).config()

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def factor_of(self, module: str) -> float:
        """What the update of `module` is multiplied by."""
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.uses_rslora else rank)

    def saves(self, module: str) -> bool:
        return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in self.saved_modules)

    def changes(self, module: str) -> bool:
        """Whether the adapter has a low-rank update of `module`; "all-linear" changes every module that it has tensors
        of."""
        if _matches(self.excluded, module) or self.saves(module):
            return False
        if self.targets == "all-linear":
            return True
        if not _matches(self.targets, module):
            return False
        return self.layers is None or isinstance(self.targets, str) or self._layer_of(module) in self.layers

    def _layer_of(self, module: str) -> int | None:
        patterns = self.layers_patterns or (r"[^.]*",)
        for pattern in patterns:
            if match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module):
                return int(match["index"])
        return None


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, V], module: str, default: V) -> V:
    """The value of the first pattern that fits the end of the module's name."""
    return next((value for key, value in patterns.items() if _compiled(rf"(.*\.)?({key})$").match(module)), default)


@lru_cache(maxsize=2 * _MOST_ENTRIES)
def _compiled(pattern: str) -> re.Pattern[str]:
    """`re` itself remembers a few hundred: a config with thousands would be compiled for every module."""
    return re.compile(pattern)


class _Reader:
    """Reads one file key by key; every refusal names the file, the key, the value and what is supported."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path = path
        self._config = config

    def config(self) -> AdapterConfig:
        self._refuse_unsupported()
        targets = self._names("target_modules", or_pattern=True)
        saved = self._names("modules_to_save")
        assert not isinstance(saved, str)
        if not targets and not saved:
            raise self._refusal("target_modules", "at least one module")
        layers_patterns = self._names("layers_pattern", one_is_list=True, patterns=True)
        assert not isinstance(layers_patterns, str)
        return AdapterConfig(
            rank=self._integer("r", self._config.get("r", 8)),
            alpha=self._number("lora_alpha", self._config.get("lora_alpha", 8)),
            rank_pattern={key: self._integer("rank_pattern", value) for key, value in self._patterns("rank_pattern")},
            alpha_pattern={key: self._number("alpha_pattern", value) for key, value in self._patterns("alpha_pattern")},
            uses_rslora=self._flag("use_rslora"),
            uses_dora=self._flag("use_dora"),
            targets=targets,
            excluded=self._names("exclude_modules", or_pattern=True),
            layers=self._layers(),
            layers_patterns=layers_patterns,
            saved_modules=saved,
        )

    def _refuse_unsupported(self) -> None:
        kind = self._config.get("peft_type")
        if kind != "LORA":
            raise self._refusal("peft_type", '"LORA"')
        if self._config.get("bias", "none") != "none":
            raise self._refusal("bias", '"none": adapters that change biases are not supported')
        if self._config.get("init_lora_weights", True) not in _PLAIN_BEGINNINGS:
            raise self._refusal(
                "init_lora_weights",
                "true, false, gaussian, eva or orthogonal: this one also changed the base model's weights; let peft "
                "convert it when it saves (path_initial_model_for_weight_conversion)",
            )
        for key, value in self._config.items():
            # What is off, empty or null asks for nothing, whatever it is called.
            if value and key not in _WITHOUT_EFFECT and key not in _READ:
                raise self._refusal(key, "leaving it out: Quire does not compute it; merge the adapter with peft")

    def _names(
        self, key: str, *, or_pattern: bool = False, one_is_list: bool = False, patterns: bool = False
    ) -> str | tuple[str, ...]:
        value = self._config.get(key)
        if value is None:
            return ()
        if isinstance(value, str) and or_pattern:
            check_pattern(value, lambda reason: self._refusal(key, f"an expression that {reason}"))
            return value
        if isinstance(value, str) and one_is_list:
            value = [value] if value else []
        if (
            not isinstance(value, list)
            or len(value) > _MOST_ENTRIES
            or not all(isinstance(n, str) and n for n in value)
        ):
            kinds = "a list of names or a regular expression" if or_pattern else "a list of names"
            raise self._refusal(key, f"{kinds}, {_MOST_ENTRIES:,} at most")
        if patterns:
            for pattern in value:
                check_pattern(pattern, lambda reason: self._refusal(key, f"expressions that {reason}"))
        return tuple(value)

    def _patterns(self, key: str) -> list[tuple[str, Any]]:
        value = self._config.get(key) or {}
        if not isinstance(value, dict) or len(value) > _MOST_ENTRIES:
            raise self._refusal(key, f"an object of modules and values, {_MOST_ENTRIES:,} at most")
        for pattern in value:
            check_pattern(pattern, lambda reason: self._refusal(key, f"expressions that {reason}"))
        return list(value.items())

    def _layers(self) -> tuple[int, ...] | None:
        value = self._config.get("layers_to_transform")
        if value is None or value == []:
            return None
        layers = [value] if type(value) is int else value
        if not isinstance(layers, list) or len(layers) > _MOST_ENTRIES or not all(type(n) is int for n in layers):
            raise self._refusal("layers_to_transform", "a list of the indices of layers")
        return tuple(layers)

    def _integer(self, key: str, value: object) -> int:
        if type(value) is not int or not 1 <= value <= _LARGEST_RANK:
            raise self._refusal(key, f"integers from 1 to {_LARGEST_RANK}")
        return value

    def _number(self, key: str, value: object) -> float:
        if type(value) not in (int, float) or not 0 < abs(value) <= _LARGEST_ALPHA:  # type: ignore[arg-type]
            raise self._refusal(key, f"numbers up to {_LARGEST_ALPHA:,.0f} that are not 0")
        return float(value)  # type: ignore[arg-type]

    def _flag(self, key: str) -> bool:
        value = self._config.get(key) or False
        if not isinstance(value, bool):
            raise self._refusal(key, "true or false")
        return value

    def _refusal(self, key: str, supported: str) -> CheckpointError:
        shown = repr(self._config.get(key))
        shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
        return CheckpointError(f"{self._path}: {key} is {shown}; supported: {supported}")
