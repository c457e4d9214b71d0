"""GPTQ: integers of 2, 3, 4 or 8 bits, as AutoGPTQ and GPTQModel write them, with a width of its own for any layer."""

from quire.quantization.stored.fields import Fields
from quire.quantization.stored.scheme import Rule, Scheme, StoredWeights

_BITS = (2, 3, 4, 8)
_LAYOUTS = {"gptq": "gptq_v1", "gptq_v2": "gptq_v2"}
"""Version 1 stores a zero point minus one."""


def read_gptq(config: Fields) -> StoredWeights:
    layout = _LAYOUTS[config.choice("checkpoint_format", tuple(_LAYOUTS), "gptq")]
    if config.values.get("is_marlin_format"):
        raise config.refusal("is_marlin_format", "false: Marlin's order of weights is for GPUs")
    if config.values.get("pack_dtype") is not None:
        config.choice("pack_dtype", ("int32",))
    usual = _scheme(config, config, layout)
    rules = []
    if (dynamic := config.optional("dynamic")) is not None:
        for key in dynamic.values:
            skips, pattern = key.startswith("-:"), key.removeprefix("+:").removeprefix("-:")
            checked = config.pattern("dynamic", pattern)
            # Matched from the beginning of a name, up to wherever the pattern ends.
            scheme = None if skips else _scheme(dynamic.inside(key), config, layout)
            rules.append(Rule(f"(?:{checked}).*", scheme))
    return StoredWeights("gptq", (*rules, Rule(".*", usual)))


def _scheme(own: Fields, usual: Fields, layout: str) -> Scheme:
    """The scheme that `own` asks for where it says so, and else `usual`."""

    def where(key: str) -> Fields:
        return usual if own.values.get(key) is None else own

    return Scheme(
        layout=layout,
        bits=where("bits").integer("bits", _BITS),
        group_size=where("group_size").group_size(),
        symmetric=where("sym").flag("sym", True),
    )
