"""What config.json says about experts: how the router chooses, which layers have them, and a shared network."""

from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

from quire.model_config.config_json import ConfigJson

RouterKind = Literal[
    "softmax_topk", "biased_softmax", "topk_softmax", "grouped_sigmoid", "grouped_softmax", "sparse_mixer"
]
ROUTER_KINDS: tuple[RouterKind, ...] = get_args(RouterKind)
MLP_TYPES = ("dense", "sparse")
TOPK_METHODS = ("greedy", "group_limited_greedy")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How a router chooses a token's experts and weighs them; `quire.models.routers` has the rules."""

    kind: RouterKind = "softmax_topk"
    num_groups: int = 1
    """Groups of equal size that the experts lie in; read for the grouped kinds."""
    num_active_groups: int = 1
    """Groups that a token's experts are chosen from."""
    scale: float = 1.0
    """Factor of the experts' weights; read for the grouped kinds."""
    jitter: float = 0.01
    """Half the relative distance below the largest logit within which a logit counts; read for sparse_mixer."""


class ExpertFields(TypedDict, total=False):
    """The fields of `ModelConfig` that this module reads."""

    num_experts: int
    dense_layers: frozenset[int]
    num_experts_per_token: int
    router: RouterConfig
    norm_topk: bool
    expert_intermediate_size: int
    shared_expert_intermediate_size: int
    shared_expert_gate: bool
    expert_bias: bool
    mxfp4_experts: bool


def mlp_width(config: ConfigJson) -> str:
    """The key with the width of an MLP. Without experts Granite 4 has the one that would stand beside them."""
    has_other = not config.value("num_experts") and config.value("mlp_width_without_experts") is not None
    return "mlp_width_without_experts" if has_other else "intermediate_size"


def read_experts(config: ConfigJson, num_layers: int, intermediate_size: int) -> ExpertFields:
    """What a config.json says about experts; nothing where it has no number of experts, or 0. The width of an expert is
    `intermediate_size` by default."""
    if config.value("num_experts") in (None, 0):
        return {}
    num_experts = _same_in_all_layers(config, "num_experts")
    num_active = _same_in_all_layers(config, "num_experts_per_tok")
    if num_active > num_experts:
        raise config.refusal("num_experts_per_tok", num_active, f"at most the number of experts {num_experts}")
    expert_width = config.integer("moe_intermediate_size", intermediate_size)
    return {
        "num_experts": num_experts,
        "dense_layers": _read_dense_layers(config, num_layers),
        "num_experts_per_token": num_active,
        "router": _read_router(config, num_experts, num_active),
        "norm_topk": config.flag("norm_topk_prob", True),
        "expert_intermediate_size": expert_width,
        "shared_expert_intermediate_size": _read_shared_width(config, expert_width),
        "shared_expert_gate": config.flag("shared_expert_gate"),
        "expert_bias": config.flag("expert_bias"),
        "mxfp4_experts": config.value("quantization_config.quant_method") == "mxfp4",
    }


def _same_in_all_layers(config: ConfigJson, key: str) -> int:
    """A number, or a list with the same number for every layer, as Hunyuan writes it."""
    value = config.value(key)
    if not isinstance(value, list):
        return config.integer(key)
    first = value[0] if value else None
    if type(first) is not int or first < 1 or any(each != first for each in value):
        raise config.refusal(key, value, "one number for all layers")
    return first


def _read_router(config: ConfigJson, num_experts: int, num_active: int) -> RouterConfig:
    kind = next((kind for kind in ROUTER_KINDS if kind == config.value("router")), ROUTER_KINDS[0])
    if kind == "sparse_mixer":
        if num_active != 2:
            raise config.refusal("num_experts_per_tok", num_active, "2")
        return RouterConfig(kind=kind, jitter=config.number("router_jitter_noise", 0.01))
    if kind not in ("grouped_sigmoid", "grouped_softmax"):
        return RouterConfig(kind=kind)
    scale = config.number("routed_scaling_factor", 1.0)
    if kind == "grouped_softmax" and config.choice("topk_method", TOPK_METHODS, "greedy") == "greedy":
        return RouterConfig(kind=kind, scale=scale)
    num_groups, num_active_groups = config.integer("n_group", 1), config.integer("topk_group", 1)
    fewest = 2 if kind == "grouped_sigmoid" else 1
    if num_experts % num_groups or num_experts < fewest * num_groups:
        two = " that leaves a group two experts or more" if fewest == 2 else ""
        raise config.refusal("n_group", num_groups, f"a divisor of the number of experts {num_experts}{two}")
    if num_active_groups > num_groups:
        raise config.refusal("topk_group", num_active_groups, f"at most the number of groups {num_groups}")
    choice = num_active_groups * (num_experts // num_groups)
    if num_active > choice:
        supported = f"at most the {choice} experts of {num_active_groups} groups"
        raise config.refusal("num_experts_per_tok", num_active, supported)
    return RouterConfig(kind=kind, num_groups=num_groups, num_active_groups=num_active_groups, scale=scale)


def _read_dense_layers(config: ConfigJson, num_layers: int) -> frozenset[int]:
    """Layers that have an MLP in a model with experts: those that `mlp_layer_types` calls dense; else the first
    `first_k_dense_replace`, those after `moe_layer_end_index`, those of `mlp_only_layers`, and all but every
    `decoder_sparse_step`-th."""
    kinds = config.value("mlp_layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in MLP_TYPES for kind in kinds):
            raise config.refusal("mlp_layer_types", kinds, f"{num_layers} times one of {', '.join(MLP_TYPES)}")
        return frozenset(layer for layer, kind in enumerate(kinds) if kind == "dense")
    first = config.integer("first_k_dense_replace", 0, minimum=0)
    step = config.integer("decoder_sparse_step", 1)
    last = config.integer("moe_layer_end_index", -1, minimum=-1)
    last = num_layers - 1 if last == -1 else last
    named = config.value("mlp_only_layers") or []
    if not isinstance(named, list) or not all(type(layer) is int for layer in named):
        raise config.refusal("mlp_only_layers", named, "a list of indices of layers")
    return frozenset(
        layer for layer in range(num_layers) if not first <= layer <= last or layer in named or (layer + 1) % step != 0
    )


def _read_shared_width(config: ConfigJson, expert_width: int) -> int:
    """Inner width of the network that every token passes: said itself (Qwen2-MoE) or as a number of experts (GLM)."""
    if config.value("n_shared_experts") is not None:
        return config.integer("n_shared_experts", minimum=0) * expert_width
    return config.integer("shared_expert_intermediate_size", 0, minimum=0)
