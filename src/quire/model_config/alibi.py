"""ALiBi: a bias of the attention scores that grows with the distance, instead of embeddings of positions."""

import math

from quire.model_config.config_json import ConfigJson


def read_alibi_slopes(config: ConfigJson, num_heads: int, head_dim: int) -> tuple[float, ...]:
    """The slopes of a config.json; empty if it has no ALiBi.

    With `alibi_before_scale` (Falcon) the bias is added before scores are scaled, and slopes are rounded to bfloat16.
    transformers also rounds each key's bias, so that it is off by up to 0.4 % of the key's position; Quire does not.
    """
    if not config.flag("alibi"):
        return ()
    slopes = alibi_slopes(num_heads, config.number("alibi_bias_max", 8.0))
    if config.flag("alibi_before_scale"):
        return tuple(_bfloat16(slope) * head_dim**-0.5 for slope in slopes)
    return slopes


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> tuple[float, ...]:
    """The slope of every head: 2 ** (-bias_max * i / n) for i from 1 to n, where the number of heads n is a power of 2.

    Other numbers of heads take slopes of the next power of 2: those of even i, then as many of odd i as are needed
    (https://arxiv.org/abs/2108.12409).
    """
    power = 1 << (num_heads - 1).bit_length()
    slopes = [2.0 ** (-bias_max * i / power) for i in range(1, power + 1)]
    return tuple(slopes if power == num_heads else (slopes[1::2] + slopes[::2])[:num_heads])


def _bfloat16(x: float) -> float:
    """The nearest number with 8 significant bits."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256), exponent - 8)
