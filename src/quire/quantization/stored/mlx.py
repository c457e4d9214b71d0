"""MLX: integers of 2, 4 or 8 bits, each group with a scale and a bias, also of the embeddings."""

from quire.quantization.stored.fields import Fields
from quire.quantization.stored.scheme import Rule, Scheme, StoredWeights

_BITS = (2, 4, 8)


def read_mlx(config: Fields) -> StoredWeights:
    rules = []
    for layer, value in config.values.items():
        # A layer's own entry: false for one in floats, or its bits and group size.
        if value is False:
            rules.append(Rule(_escaped(layer), None))
        elif isinstance(value, dict):
            rules.append(Rule(_escaped(layer), _scheme(config.inside(layer))))
    return StoredWeights("MLX", (*rules, Rule(".*", _scheme(config))))


def _scheme(config: Fields) -> Scheme:
    config.choice("mode", ("affine",), "affine")
    bits, group_size = config.integer("bits", _BITS), config.group_size()
    if group_size is None:
        raise config.refusal("group_size", "a multiple of 8 from 8 on")
    return Scheme(layout="mlx", bits=bits, group_size=group_size)


def _escaped(name: str) -> str:
    return "".join(f"\\{each}" if not each.isalnum() and each != "_" else each for each in name)
