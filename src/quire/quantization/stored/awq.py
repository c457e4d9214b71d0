"""AWQ: integers of 4 bits with zero points, in AutoAWQ's layouts gemm and gemv."""

from quire.quantization.stored.fields import Fields
from quire.quantization.stored.scheme import Rule, Scheme, StoredWeights

_VERSIONS = ("gemm", "gemv")


def read_awq(config: Fields) -> StoredWeights:
    # GPTQModel names the version checkpoint_format; AutoAWQ's own early files call the two numbers w_bit, q_group_size.
    key = "version" if "version" in config.values else "checkpoint_format"
    value = config.values.get(key)
    named = Fields(config.path, config.name, {**config.values, key: value.lower() if isinstance(value, str) else value})
    version = named.choice(key, _VERSIONS, "gemm")
    bits = "w_bit" if "w_bit" in config.values else "bits"
    group = "q_group_size" if "q_group_size" in config.values else "group_size"
    scheme = Scheme(
        layout=f"awq_{version}",
        bits=config.integer(bits, (4,)),
        group_size=config.group_size(group, default=128),
        symmetric=not config.flag("zero_point", True),
    )
    return StoredWeights("awq", (Rule(".*", scheme),))
