"""How config.json says which layers attend to a sliding window only, and which rotate queries and keys."""

from quire.model_config.config_json import ConfigJson

_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_layer_windows(config: ConfigJson, num_layers: int) -> tuple[int, ...]:
    """The window of every layer in positions; 0 for a layer that attends to all.

    `layer_types` decides if there is one, then `sliding_window_pattern`: every so many layers one attends to all
    (Gemma), or letters (EXAONE 4). Else the layers that rotate nothing have the window (SmolLM3), or those from
    `max_window_layers` on (Qwen), or every other layer before it (Qwen2-MoE).
    """
    if config.value("sliding_window") is None:
        _check_unwindowed(config, num_layers, "there is no sliding_window")
        return (0,) * num_layers
    if not config.flag("use_sliding_window"):
        _check_unwindowed(config, num_layers, "use_sliding_window is false")
        return (0,) * num_layers
    window = config.integer("sliding_window")
    if config.flag("is_encoder"):
        window = 2 * (window // 2) + 1  # half of it before a token, half behind it, and the token
    layer_types = config.value("layer_types")
    if layer_types is not None:
        if not _are_known(layer_types, num_layers):
            raise config.refusal("layer_types", layer_types, f"{num_layers} times one of {', '.join(_LAYER_TYPES)}")
        return tuple(0 if layer_type == "full_attention" else window for layer_type in layer_types)
    if config.value("global_attn_every_n_layers") is not None:
        every = config.integer("global_attn_every_n_layers")
        return tuple(0 if layer % every == 0 else window for layer in range(num_layers))
    pattern = config.value("sliding_window_pattern")
    if isinstance(pattern, str):
        return _windows_of_letters(config, pattern, window, num_layers)
    if pattern is not None:
        pattern = config.integer("sliding_window_pattern")
        return tuple(0 if (layer + 1) % pattern == 0 else window for layer in range(num_layers))
    rotates = read_no_rope_layers(config, num_layers)
    if rotates:
        return tuple(0 if turns else window for turns in rotates)
    first = config.integer("max_window_layers", 28, minimum=0)
    if config.flag("alternate_windows"):
        return tuple(window if layer % 2 == 0 and layer < first else 0 for layer in range(num_layers))
    return tuple(window if layer >= first else 0 for layer in range(num_layers))


def _are_known(layer_types: object, num_layers: int) -> bool:
    """Whether config.json names as many layers as there are, of kinds that are known."""
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        return False
    return all(isinstance(kind, str) and kind in _LAYER_TYPES for kind in layer_types)


def _check_unwindowed(config: ConfigJson, num_layers: int, reason: str) -> None:
    """Refuse layers with a window where config.json turns windows off, and kinds of layers that are not known."""
    layer_types = config.value("layer_types")
    if layer_types is None or config.value("recurrent_kind") is not None:
        return
    if config.value("sliding_window") is None and _are_known(layer_types, num_layers):
        if "sliding_attention" in layer_types:
            supported = "a number of positions, since layers with a window are among layer_types"
            raise config.refusal("sliding_window", None, supported)
        return
    if layer_types != ["full_attention"] * num_layers:
        supported = f"{num_layers} times full_attention where {reason}"
        raise config.refusal("layer_types", layer_types, supported)


def _windows_of_letters(config: ConfigJson, pattern: str, window: int, num_layers: int) -> tuple[int, ...]:
    """A pattern that repeats, L for a window and G for all positions; the last layer attends to all."""
    if not pattern or set(pattern) - {"L", "G"}:
        supported = "a number of layers, or the letters L (a window) and G (all positions)"
        raise config.refusal("sliding_window_pattern", pattern, supported)
    letters = (pattern * num_layers)[: num_layers - 1] + "G"
    return tuple(window if letter == "L" else 0 for letter in letters)


def read_no_rope_layers(config: ConfigJson, num_layers: int) -> tuple[bool, ...]:
    """Whether each layer rotates its queries and keys, where config.json says it layer by layer; else empty.

    `no_rope_layers` has, despite its name, a 1 for each layer that does. Without it every `no_rope_layer_interval`-th
    layer does not.
    """
    flags = config.value("no_rope_layers")
    if flags is not None:
        if not isinstance(flags, list) or len(flags) < num_layers or not all(flag in (0, 1) for flag in flags):
            raise config.refusal("no_rope_layers", flags, f"{num_layers} times 0 or 1")
        return tuple(map(bool, flags[:num_layers]))
    if config.value("no_rope_layer_interval") is None:
        return ()
    interval = config.integer("no_rope_layer_interval")
    return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
