"""bitsandbytes: nf4 and fp4 in blocks of the flattened matrix, scales plain or quantised themselves; int8 by output."""

from quire.quantization.stored.fields import Fields
from quire.quantization.stored.scheme import Rule, Scheme, StoredWeights

BLOCK = 64
"""Numbers that share a scale; a tensor's own state says so too."""


def read_bitsandbytes(config: Fields) -> StoredWeights:
    in_8, in_4 = config.flag("load_in_8bit", False), config.flag("load_in_4bit", False)
    if in_8 == in_4:
        raise config.refusal("load_in_4bit", "one of load_in_4bit and load_in_8bit, true")
    if in_8:
        scheme = Scheme(layout="bnb_8bit", bits=8, symmetric=True)
    else:
        config.choice("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
        config.choice("bnb_4bit_quant_storage", ("uint8",), "uint8")
        scheme = Scheme(layout="bnb_4bit", bits=4, group_size=BLOCK, symmetric=True)
    return StoredWeights("bitsandbytes", (Rule(".*", scheme),))
