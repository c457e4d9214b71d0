"""How config.json says which norms a layer has, and where."""

from typing import Any

from quire.model_config.config_json import ConfigJson


def read_norms(config: ConfigJson) -> dict[str, Any]:
    """The fields that say which norms there are, and where."""
    norm_before = config.flag("norm_before", True)
    return {
        "norm": config.choice("norm", ("rms_norm", "layer_norm"), "rms_norm"),
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "norm_bias": config.flag("norm_bias"),
        "norm_unit_offset": config.flag("norm_unit_offset"),
        "norm_before": norm_before,
        "final_norm": norm_before and not config.flag("no_final_norm"),
        "pre_norms": config.flag("pre_norms", True),
        "first_norm": not config.flag("no_first_norm"),
        "post_norms": config.flag("post_norms"),
        "embedding_norm": config.flag("embedding_norm"),
        "parallel_residual": config.flag("parallel_residual") or config.flag("new_decoder_architecture"),
        "parallel_mlp_norm": config.flag("parallel_mlp_norm") or _has_falcon_norms(config),
    }


def _has_falcon_norms(config: ConfigJson) -> bool:
    """Falcon's newer layers have two norms, or one if config.json says so."""
    if not config.flag("new_decoder_architecture"):
        return False
    number = config.integer("num_ln_in_parallel_attn", 2)
    if number > 2:
        raise config.refusal("num_ln_in_parallel_attn", number, "1 or 2")
    return number == 2
