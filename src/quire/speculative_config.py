"""SpeculativeConfig: how tokens are drafted. One option of the engine, with fields of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from quire.errors import ConfigError
from quire.option_values import check_keys, read_object

SPECULATIVE_METHODS = ("ngram",)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are drafted before the model computes them. Names and meanings are vLLM's."""

    method: str = "ngram"
    """ngram: the tokens that followed an earlier occurrence of the last tokens, in prompt or output."""
    num_speculative_tokens: int = 16
    """Longest draft in tokens; every step decides how much of a draft it computes."""
    prompt_lookup_max: int = 8
    """Most last tokens to look for; a longer match is preferred."""
    prompt_lookup_min: int = 1
    """Fewest last tokens to look for."""

    def __post_init__(self) -> None:
        if self.method not in SPECULATIVE_METHODS:
            raise ConfigError(
                f"speculative_config: method is {self.method!r}; it must be {' or '.join(SPECULATIVE_METHODS)}"
            )
        for name, high in (("num_speculative_tokens", 64), ("prompt_lookup_max", 64), ("prompt_lookup_min", 64)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= high:
                raise ConfigError(f"speculative_config: {name} is {value!r}; it must be an integer from 1 to {high}")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"speculative_config: prompt_lookup_min is {self.prompt_lookup_min}, more than prompt_lookup_max "
                f"{self.prompt_lookup_max}"
            )

    @classmethod
    def read(cls, value: "SpeculativeConfig | Mapping[str, Any] | str") -> "SpeculativeConfig":
        """From a mapping, or from JSON. Raises `ConfigError`."""
        if isinstance(value, SpeculativeConfig):
            return value
        value = read_object("speculative_config", value, {"method": SPECULATIVE_METHODS[0]})
        if value.get("method", "ngram") not in SPECULATIVE_METHODS or "model" in value:
            asked = value.get("method") or value["model"]
            raise ConfigError(
                f"speculative_config asks for {asked!r}; Quire drafts without a second model: give "
                f"{{'method': '{SPECULATIVE_METHODS[0]}'}}, or leave it out"
            )
        check_keys("speculative_config", value, [field.name for field in fields(cls)])
        return cls(**value)
