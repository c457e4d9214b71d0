"""torchao: integers and e4m3 numbers of 8 bits, one an element, as its second version of configs saves them.

What is packed for the kernels of a GPU is refused by the name of its config. Activations that a config describes stay
floats. Which layers have few bits is for the files to say.
"""

from quire.quantization.stored.fields import Fields
from quire.quantization.stored.scheme import Rule, Scheme, StoredWeights

_INTEGERS = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Int8StaticActivationInt8WeightConfig")
_UNPACKED = ("IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig")
_FLOATS = (
    "Float8WeightOnlyConfig",
    "Float8DynamicActivationFloat8WeightConfig",
    "Float8StaticActivationFloat8WeightConfig",
)
_BY_NAME = {"FqnToConfig": "fqn_to_config", "ModuleFqnToConfig": "module_fqn_to_config"}
"""Configs that hold one for each layer, and where."""
_SUPPORTED = (*_INTEGERS, *_UNPACKED, *_FLOATS)
_MAPPINGS = ("SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR", "ASYMMETRIC")


def read_torchao(config: Fields) -> StoredWeights:
    kinds = config.inside("quant_type")
    if not kinds.values:
        raise config.refusal("quant_type", f"an object with a config: {', '.join(_SUPPORTED)}")
    symmetric = True
    for key in kinds.values:
        for each in _configs(kinds.inside(key)):
            symmetric &= _is_symmetric(each)
    return StoredWeights("torchao", (Rule(".*", Scheme(layout="torchao", bits=8, symmetric=symmetric)),))


def _configs(config: Fields) -> list[Fields]:
    """A config, or those that it holds for layers by name; null there is a layer in floats."""
    name = config.choice("_type", (*_SUPPORTED, *_BY_NAME))
    if name not in _BY_NAME:
        return [config]
    layers = config.inside("_data").inside(_BY_NAME[name])
    return [layers.inside(layer) for layer, value in layers.values.items() if value is not None]


def _is_symmetric(config: Fields) -> bool:
    """Whether a layer has no zero points. Raises `CheckpointError` for a config that is not supported."""
    name, data = config.choice("_type", _SUPPORTED), config.inside("_data")
    if name not in _UNPACKED:
        return True
    if (packing := data.optional("intx_packing_format")) is not None:
        packing.choice("_data", ("UNPACKED_TO_INT8",))
    mapping = data.optional("weight_mapping_type") or data.optional("mapping_type")
    return mapping is None or mapping.choice("_data", _MAPPINGS) != "ASYMMETRIC"
