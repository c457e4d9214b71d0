"""compressed-tensors, which llm-compressor writes: groups of layers, each with its own kind of numbers and scales."""

from typing import Any

from quire.quantization.stored.fields import Fields
from quire.quantization.stored.fp8 import read_block
from quire.quantization.stored.scheme import Rule, Scheme, StoredWeights

_LAYOUTS = {
    "pack-quantized": "packed_int32",
    "int-quantized": "scaled",
    "float-quantized": "scaled",
    "naive-quantized": "scaled",
    "mxfp8-quantized": "mxfp8",
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
}
"""Its name of a format → ours of the layout."""
_NUMBERS = {
    "packed_int32": ("int", (2, 3, 4, 5, 6, 7, 8)),
    "mxfp8": ("float", (8,)),
    "nvfp4": ("float", (4,)),
    "mxfp4": ("float", (4,)),
}
"""Type and bits of a layout's numbers."""
_GROUPS = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}
"""Inputs that share a scale, where the layout says so."""


def read_compressed_tensors(config: Fields) -> StoredWeights:
    sparsity = config.optional("sparsity_config")
    if sparsity is not None and sparsity.values.get("format") is not None:
        sparsity.choice("format", ("dense",))
    groups = config.inside("config_groups")
    skipped = [Rule(_pattern(config, "ignore", name), None) for name in config.names("ignore")]
    rules = []
    for name in groups.values:
        group = groups.inside(name)
        if group.values.get("weights") is None:
            raise group.refusal("weights", "an object that says how weights are stored")
        if group.values.get("output_activations") is not None:
            raise group.refusal("output_activations", "null")
        scheme = _scheme(config, group)
        targets = group.names("targets")
        if not targets:
            raise group.refusal("targets", 'a list of layers such as ["Linear"]')
        rules += [Rule(_pattern(group, "targets", target), scheme) for target in targets]
    if not rules:
        raise config.refusal("config_groups", "at least one group")
    # Names go before classes, whatever their order.
    rules.sort(key=lambda rule: rule.pattern == ".*")
    return StoredWeights("compressed-tensors", (*skipped, *rules))


def _scheme(config: Fields, group: Fields) -> Scheme:
    source = config if group.values.get("format") is None else group
    # A file of mixed precision says which format a group has in the group.
    layout = _LAYOUTS[source.choice("format", tuple(_LAYOUTS))]
    weights = group.inside("weights")
    if layout in _NUMBERS:
        kind, widths = _NUMBERS[layout]
        weights.choice("type", (kind,), "int")
        bits = weights.integer("num_bits", widths)
    else:
        kind = weights.choice("type", ("int", "float"), "int")
        bits = weights.integer("num_bits", (8,))
        layout = f"{layout}_{kind}"
    if weights.values.get("dynamic"):
        raise weights.refusal("dynamic", "false: weights are stored")
    block, group_size = _extent(weights, layout)
    return Scheme(
        layout=layout,
        bits=bits,
        group_size=group_size,
        symmetric=weights.flag("symmetric", True),
        block=block,
    )


def _extent(weights: Fields, layout: str) -> tuple[tuple[int, int] | None, int | None]:
    """The tiles and the groups of inputs that share a scale."""
    values: dict[str, Any] = weights.values
    size = values.get("group_size")
    usual = "tensor" if size in (None, 0) else "channel" if size == -1 else "group"
    strategies = ("group", "tensor_group") if layout in _GROUPS else ("tensor", "channel", "group", "block")
    strategy = weights.choice("strategy", strategies, usual)
    if strategy == "block":
        block = read_block(weights, "block_structure")
        if block is None:
            raise weights.refusal("block_structure", "two sizes, such as [128, 128]")
        return block, None
    if strategy in ("group", "tensor_group"):
        if layout in _GROUPS:
            return None, weights.integer("group_size", (_GROUPS[layout],), _GROUPS[layout])
        return None, weights.group_size()
    return None, None


def _pattern(config: Fields, key: str, name: str) -> str:
    """The pattern of a name, of an expression after "re:", or of a class of layers."""
    if name.startswith("re:"):
        # Matched from the beginning of a name, up to wherever the expression ends.
        return f"(?:{config.pattern(key, name.removeprefix('re:'))}).*"
    if name == "Linear":
        return ".*"
    return "".join(each if each.isalnum() or each == "_" else f"\\{each}" for each in name)
