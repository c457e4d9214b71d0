"""VisionConfig: the image encoder of a model that reads images, as data."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quire.layer_spec import LinearSpec, VectorSpec
from quire.model_config.config_json import ConfigJson
from quire.model_config.image_processing import CLIP_MEAN, CLIP_STD, HALF, ImageProcessing, read_processing

ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
}
"""config.json's name → ours, for encoders and projectors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """Shape and rules of an image encoder and its projector."""

    family: str
    """The row of `quire.images.FAMILIES`."""
    image_token_id: int
    """The placeholder whose embeddings an image's take the place of."""
    marker_token_id: int
    """The token that a chat template writes for an image; mostly the placeholder itself."""
    processing: ImageProcessing

    hidden_size: int
    intermediate_size: int
    num_layers: int
    """Layers that are computed; those after the last feature are left out."""
    num_heads: int
    patch_size: int
    image_size: int = 0
    """Height and width of a tile; 0: images keep their shape."""
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6

    feature_layers: tuple[int, ...] = ()
    """The layers after which features are taken, counted from 1; 0 is the embeddings. Empty: the last, normed."""
    keeps_class: bool = False
    """The class token's feature is one of the image's (`vision_feature_select_strategy` full)."""
    projector_width: int = 0
    """Width of what the projector writes: the hidden size of the text model."""
    projector_activation: str = "gelu"
    projector_bias: bool = True
    merge: int = 1
    """So many patches in each direction become one token."""
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    """(height, width) of the grids that an image is cut into (LLaVA 1.6)."""
    window_size: int = 0
    """Pixels in each direction of a window of attention (Qwen2.5-VL); 0: attention has none."""
    full_attention_layers: frozenset[int] = frozenset()
    """Layers whose attention has no window."""
    gated_mlp: bool = False
    whole_image_tokens: int = 0
    """Tokens of an image, where each sees all of them (Gemma 3); 0: each sees those before it."""

    def has_window(self, layer: int) -> bool:
        """Whether a layer attends within windows."""
        return self.window_size > 0 and layer not in self.full_attention_layers

    @property
    def patches_per_side(self) -> int:
        """Patches of a tile in each direction."""
        return self.image_size // self.patch_size

    @property
    def patch_elements(self) -> int:
        """Values of one patch, which the first product reads."""
        return 3 * self.patch_size**2

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """All matrices, for the memory plan; no quantisation touches them."""
        hidden, inner = self.hidden_size, self.intermediate_size
        layer = [("qkv", 3 * hidden, hidden), ("o", hidden, hidden), ("down", hidden, inner)]
        layer += [("up", inner, hidden)] * (2 if self.gated_mlp else 1)
        ends = [("patches", hidden, self.patch_elements), *self._projector]
        return tuple(LinearSpec(*entry, quantizes=False) for entry in (*ends, *layer * self.num_layers))

    @property
    def _projector(self) -> list[tuple[str, int, int]]:
        merged, width = self.hidden_size * self.merge**2, self.projector_width
        match self.family:
            case "idefics3":
                return [("projector", width, merged)]
            case "gemma3":
                return [("projector", width, self.hidden_size)]
            case "qwen2_vl" | "qwen2_5_vl":
                return [("merger", merged, merged), ("projector", width, merged)]
        return [("linear_1", width, self.hidden_size * len(self.feature_layers)), ("linear_2", width, width)]

    @property
    def vectors(self) -> tuple[VectorSpec, ...]:
        """Norms, biases and position embeddings, to a few parameters."""
        hidden, inner = self.hidden_size, self.intermediate_size
        positions = self.patches_per_side**2 + 3
        return (VectorSpec("encoder", self.num_layers * (9 * hidden + 2 * inner) + positions * hidden),)

    def activation_bytes(self, num_patches: int) -> int:
        """Peak memory, in float32, of encoding so many patches at once."""
        return num_patches * (8 * self.hidden_size + 2 * self.intermediate_size + self.patch_elements) * 4


def read_vision(config: ConfigJson, hidden_size: int) -> VisionConfig | None:
    """The encoder that config.json describes; None for a row of a text model."""
    family = config.vision
    return _READERS[family](config, family, hidden_size) if family else None


def _tower(config: ConfigJson, family: str, hidden_size: int, defaults: dict[str, int]) -> dict[str, Any]:
    """Fields that the towers of CLIP and SigLIP share; `defaults` are those of the family's config class."""

    def integer(key: str) -> int:
        return config.integer(f"vision_config.{key}", defaults[key])

    image_size, patch_size = integer("image_size"), integer("patch_size")
    num_heads = integer("num_attention_heads")
    if image_size % patch_size:
        raise config.refusal("vision_config.image_size", image_size, f"a multiple of patch_size {patch_size}")
    if integer("hidden_size") % num_heads:
        raise config.refusal("vision_config.hidden_size", integer("hidden_size"), f"a multiple of {num_heads} heads")
    if integer("num_channels") != 3:
        raise config.refusal("vision_config.num_channels", integer("num_channels"), "3")
    default = "quick_gelu" if family.startswith("llava") else "gelu_pytorch_tanh"
    eps = 1e-5 if family.startswith("llava") else 1e-6
    return {
        "family": family,
        "hidden_size": integer("hidden_size"),
        "intermediate_size": integer("intermediate_size"),
        "num_layers": integer("num_hidden_layers"),
        "num_heads": num_heads,
        "patch_size": patch_size,
        "image_size": image_size,
        "activation": ACTIVATIONS[config.choice("vision_config.hidden_act", tuple(ACTIVATIONS), default)],
        "norm_eps": config.number("vision_config.layer_norm_eps", eps),
        "projector_width": hidden_size,
    }


_CLIP_PROCESSING: dict[str, Any] = {
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}


def _read_llava(config: ConfigJson, family: str, hidden_size: int) -> VisionConfig:
    is_next = family == "llava_next"
    kind = config.choice("vision_config.model_type", ("clip_vision_model",), "clip_vision_model")
    assert kind
    fields = _tower(
        config,
        family,
        hidden_size,
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "num_channels": 3,
        },
    )
    num_layers, named = fields["num_layers"], config.value("vision_feature_layer")
    named = -2 if named is None else named
    layers = [named] if isinstance(named, int) else named
    if (
        not isinstance(layers, list)
        or not layers
        or not all(type(layer) is int and -num_layers - 1 <= layer <= num_layers for layer in layers)
    ):
        raise config.refusal("vision_feature_layer", named, f"a layer, or a list of layers, of {num_layers}")
    layers = [layer % (num_layers + 1) for layer in layers]
    strategy = config.choice("vision_feature_select_strategy", ("default", "full"), "default")
    token = config.integer("image_token_index", config.integer("image_token_id", 32000, minimum=0), minimum=0)
    pinpoints = config.value("image_grid_pinpoints") if is_next else []
    if is_next and pinpoints is None:
        pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    side = fields["image_size"]
    if not isinstance(pinpoints, list) or not all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(edge) is int and edge > 0 and not edge % side for edge in pair)
        for pair in pinpoints
    ):
        raise config.refusal("image_grid_pinpoints", pinpoints, f"pairs of multiples of image_size {side}")
    defaults = {**_CLIP_PROCESSING, "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return VisionConfig(
        **{**fields, "num_layers": max(layers)},
        image_token_id=token,
        marker_token_id=token,
        processing=_checked(config, side, read_processing(config.path.parent, defaults)),
        feature_layers=tuple(layers),
        keeps_class=strategy == "full",
        projector_activation=ACTIVATIONS[config.choice("projector_hidden_act", tuple(ACTIVATIONS), "gelu")],
        projector_bias=config.flag("multimodal_projector_bias", True),
        grid_pinpoints=tuple((height, width) for height, width in pinpoints),
    )


def _checked(config: ConfigJson, side: int, processing: ImageProcessing) -> ImageProcessing:
    """The processing, if what it makes of an image are tiles of the encoder's size."""
    size = processing.size
    made = processing.crop or (size.height, size.width)
    edge = size.shortest_edge or min(size.height, size.width)
    if made != (side, side) or edge < side:
        raise config.refusal(
            "vision_config.image_size", side, f"the size that preprocessor_config.json makes, {made[0]} × {made[1]}"
        )
    return processing


def _read_idefics3(config: ConfigJson, family: str, hidden_size: int) -> VisionConfig:
    fields = _tower(
        config,
        family,
        hidden_size,
        {
            "hidden_size": 1152,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 32,
            "num_channels": 3,
        },
    )
    side, merge = fields["image_size"], config.integer("scale_factor", 2)
    if (side // fields["patch_size"]) % merge:
        raise config.refusal(
            "scale_factor", merge, f"a divisor of the {side // fields['patch_size']} patches of a side"
        )
    token = config.integer("image_token_id", 128257, minimum=0)
    defaults = {
        "size": {"longest_edge": 4 * side},
        "max_image_size": {"longest_edge": side},
        "do_image_splitting": True,
        "resample": 1,
        "image_mean": list(HALF),
        "image_std": list(HALF),
    }
    processing = read_processing(config.path.parent, defaults)
    if processing.tile != side:
        raise config.refusal("vision_config.image_size", side, f"the max_image_size {processing.tile} of its processor")
    return VisionConfig(
        **fields, image_token_id=token, marker_token_id=token, processing=processing, merge=merge, projector_bias=False
    )


def _read_gemma3(config: ConfigJson, family: str, hidden_size: int) -> VisionConfig | None:
    """None for a file that describes no encoder: its model reads text only."""
    if config.value("vision_config") is None:
        return None
    defaults = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    fields = _tower(config, family, hidden_size, {**defaults, "image_size": 224, "patch_size": 16, "num_channels": 3})
    side, num_tokens = fields["image_size"] // fields["patch_size"], config.integer("mm_tokens_per_image", 256)
    tokens_per_side = math.isqrt(num_tokens)
    if tokens_per_side**2 != num_tokens or side % tokens_per_side:
        raise config.refusal("mm_tokens_per_image", num_tokens, f"the square of a divisor of the {side} patches a side")
    window = config.value("sliding_window")
    if isinstance(window, int) and window < num_tokens:
        raise config.refusal(
            "sliding_window", window, f"at least the {num_tokens} tokens of an image, which see each other"
        )
    edge = fields["image_size"]
    processing = {"size": {"height": edge, "width": edge}, "resample": 2, "image_mean": HALF, "image_std": HALF}
    return VisionConfig(
        **fields,
        image_token_id=config.integer(
            "image_token_index", config.integer("image_token_id", 262144, minimum=0), minimum=0
        ),
        marker_token_id=config.integer("boi_token_index", config.integer("boi_token_id", 255999, minimum=0), minimum=0),
        processing=_checked(config, edge, read_processing(config.path.parent, processing)),
        merge=side // tokens_per_side,
        whole_image_tokens=num_tokens,
    )


_QWEN: dict[str, int] = {
    "hidden_size": 3584,
    "depth": 32,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def _read_qwen2(config: ConfigJson, family: str, hidden_size: int) -> VisionConfig:
    """Qwen2-VL. Its `hidden_size` is what the projector writes; the layers have `embed_dim`."""
    fields = _qwen_fields(config, {"embed_dim": 1280, "mlp_ratio": 4})
    out = fields["hidden_size"]
    if out != hidden_size:
        raise config.refusal("vision_config.hidden_size", out, f"the text model's hidden_size {hidden_size}")
    width = fields["embed_dim"]
    return _qwen(
        config, family, fields, hidden_size, {"hidden_size": width, "intermediate_size": width * fields["mlp_ratio"]}
    )


def _read_qwen2_5(config: ConfigJson, family: str, hidden_size: int) -> VisionConfig:
    fields = _qwen_fields(config, {"intermediate_size": 3420, "window_size": 112})
    token = fields["spatial_merge_size"] * fields["patch_size"]
    if fields["window_size"] // token < 1:
        raise config.refusal("vision_config.window_size", fields["window_size"], f"at least {token} pixels")
    out = config.integer("vision_config.out_hidden_size", hidden_size)
    if out != hidden_size:
        raise config.refusal("vision_config.out_hidden_size", out, f"the hidden_size {hidden_size}")
    full = config.value("vision_config.fullatt_block_indexes")
    full = [7, 15, 23, 31] if full is None else full
    if not isinstance(full, list) or not all(type(layer) is int for layer in full):
        raise config.refusal("vision_config.fullatt_block_indexes", full, "a list of layers")
    own = {"window_size": fields["window_size"], "full_attention_layers": frozenset(full), "gated_mlp": True}
    return _qwen(
        config,
        family,
        fields,
        hidden_size,
        {"hidden_size": fields["hidden_size"], "intermediate_size": fields["intermediate_size"], **own},
    )


def _qwen_fields(config: ConfigJson, own: dict[str, int]) -> dict[str, int]:
    fields = {key: config.integer(f"vision_config.{key}", default) for key, default in {**_QWEN, **own}.items()}
    for key in ("in_channels", "temporal_patch_size"):
        if fields[key] != _QWEN[key]:
            raise config.refusal(f"vision_config.{key}", fields[key], str(_QWEN[key]))
    return fields


def _qwen(
    config: ConfigJson, family: str, fields: dict[str, int], hidden_size: int, own: dict[str, Any]
) -> VisionConfig:
    """What both families share; `own` are the sizes of the layers."""
    width, num_heads = own["hidden_size"], fields["num_heads"]
    if width % (4 * num_heads):
        key = "embed_dim" if "embed_dim" in fields else "hidden_size"
        raise config.refusal(f"vision_config.{key}", width, f"a multiple of 4 × {num_heads} heads")
    token = config.integer("image_token_id", 151655, minimum=0)
    processing = {
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "resample": 3,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    default = "silu" if own.get("gated_mlp") else "quick_gelu"
    return VisionConfig(
        family=family,
        image_token_id=token,
        marker_token_id=token,
        processing=read_processing(config.path.parent, processing),
        num_layers=fields["depth"],
        num_heads=num_heads,
        patch_size=fields["patch_size"],
        activation=ACTIVATIONS[config.choice("vision_config.hidden_act", tuple(ACTIVATIONS), default)],
        projector_width=hidden_size,
        merge=fields["spatial_merge_size"],
        **own,
    )


_READERS: dict[str, Callable[[ConfigJson, str, int], VisionConfig | None]] = {
    "llava": _read_llava,
    "llava_next": _read_llava,
    "idefics3": _read_idefics3,
    "gemma3": _read_gemma3,
    "qwen2_vl": _read_qwen2,
    "qwen2_5_vl": _read_qwen2_5,
}
