"""FP8: numbers of float8 (e4m3) with a scale for each tile, output or tensor, as DeepSeek-V3 and Qwen3 publish them."""

from quire.quantization.stored.fields import LARGEST_GROUP, Fields
from quire.quantization.stored.scheme import Rule, Scheme, StoredWeights


def read_fp8(config: Fields) -> StoredWeights:
    config.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    config.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    block = read_block(config, "weight_block_size")
    return StoredWeights("fp8", (Rule(".*", Scheme(layout="fp8", bits=8, symmetric=True, block=block)),))


def read_block(config: Fields, key: str) -> tuple[int, int] | None:
    """Outputs and inputs of a tile; None where the key is missing."""
    block = config.values.get(key)
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(_is_size(size) for size in block) or block[1] % 8:
        raise config.refusal(key, "two sizes [outputs, inputs], the second a multiple of 8, such as [128, 128]")
    return block[0], block[1]


def _is_size(size: object) -> bool:
    return type(size) is int and 1 <= size <= LARGEST_GROUP
