"""ALiBi: a bias of the attention scores that grows with the distance, instead of embeddings of positions."""

from quire.model_config.config_json import ConfigJson


def read_alibi_slopes(config: ConfigJson, num_heads: int) -> tuple[float, ...]:
    """The slopes of a config.json; empty if it has no ALiBi."""
    if not config.flag("alibi"):
        return ()
    return alibi_slopes(num_heads, config.number("alibi_bias_max", 8.0))


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> tuple[float, ...]:
    """The slope of every head: 2 ** (-bias_max * i / n) for i from 1 to n, where the number of heads n is a power of 2.

    Other numbers of heads take slopes of the next power of 2: those of even i, then as many of odd i as are needed
    (https://arxiv.org/abs/2108.12409).
    """
    power = 1 << (num_heads - 1).bit_length()
    slopes = [2.0 ** (-bias_max * i / power) for i in range(1, power + 1)]
    return tuple(slopes if power == num_heads else (slopes[1::2] + slopes[::2])[:num_heads])
