"""Target: what `quire convert --to` asks for. No torch."""

from typing import NamedTuple

from quire.errors import ConfigError
from quire.quantization import METHODS

FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_SPELLINGS = {**{name: short for short, name in FLOATS.items()}, "f16": "fp16", "f32": "fp32"}
_GGUF = "gguf"
BLOCKS = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q5_1": 9, "Q5_0": 8, "Q4_1": 3, "Q4_0": 2}
"""Types of block that are written → llama.cpp's number of a file of them."""
DEFAULT_BLOCK = "Q8_0"


class Target(NamedTuple):
    """A kind of result."""

    kind: str
    """packed, floats or gguf."""
    form: str
    """A row of METHODS, a float type, or a type of block."""
    ending: str
    """How the default name of a result ends."""

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Raises `ConfigError` for a text that is none."""
        name = _SPELLINGS.get(text, text)
        if name in METHODS:
            return cls("packed", name, f"-{name}")
        if name in FLOATS:
            return cls("floats", FLOATS[name], f"-{name}")
        kind, colon, block = name.partition(":")
        block = block.upper() if colon else DEFAULT_BLOCK
        if kind.lower() != _GGUF:
            raise ConfigError(f"to is {text!r}; supported: {', '.join((*METHODS, *FLOATS, _GGUF, f'{_GGUF}:TYPE'))}")
        if block not in BLOCKS:
            raise ConfigError(
                f"to is {text!r}; supported after {_GGUF}: are {', '.join(BLOCKS)}; for k-quants write {_GGUF}:BF16 "
                "and give it to llama.cpp's llama-quantize"
            )
        return cls(_GGUF, block, f"-{block}.gguf")
