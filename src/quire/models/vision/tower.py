"""Tower: the vision transformer of CLIP and SigLIP. Its tiles are squares of one size.

B tiles, N patches of a tile (and the class token, if there is one), H hidden size of the tower.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from quire.layers.activation import activation_function
from quire.layers.linear import Linear, LinearWeight
from quire.layers.norm import LayerNorm
from quire.model_config import VisionConfig
from quire.models.builder import Builder
from quire.models.vision.encoder import Layers


def vision_linear(build: Builder, rows: Mapping[str, int], num_inputs: int, *, bias: bool = True) -> Linear:
    """One layer from several stored ones, outputs side by side, in floats whatever the quantisation."""
    take = build.weights.take_linear
    return build.pack(*(take(name, (count, num_inputs), bias=bias) for name, count in rows.items()), quantizes=False)


def patch_embedding(build: Builder, name: str, width: int, shape: tuple[int, ...], *, bias: bool) -> Linear:
    """A convolution over patches as a dense layer over their values. `shape` is that of a patch: channels first."""
    weight = build.weights.take(f"{name}.weight", (width, *shape)).flatten(1)
    stored = LinearWeight(weight, build.weights.take(f"{name}.bias", (width,)) if bias else None)
    return build.pack(stored, quantizes=False)


def layer_norm(build: Builder, name: str, width: int, eps: float) -> LayerNorm:
    dtype = build.weights.activation_dtype
    weight, bias = (build.weights.take(f"{name}.{part}", (width,)).to(dtype) for part in ("weight", "bias"))
    return LayerNorm(weight, bias, eps)


class Tower:
    """Patches, position embeddings, and layers with a norm before each half."""

    def __init__(self, build: Builder, vision: VisionConfig, *, has_class: bool) -> None:
        """`has_class`: CLIP's, with a class token before the patches and a norm before the layers."""
        width, eps, patch = vision.hidden_size, vision.norm_eps, vision.patch_size
        embeddings, dtype = build.scope("embeddings"), build.weights.activation_dtype
        self.patch_size = patch
        self.patches = patch_embedding(embeddings, "patch_embedding", width, (3, patch, patch), bias=not has_class)
        num_positions = vision.patches_per_side**2 + has_class
        self.positions = embeddings.weights.take("position_embedding.weight", (num_positions, width)).to(dtype)
        self.class_embedding: Tensor | None = None
        self.first_norm: LayerNorm | None = None
        if has_class:
            self.class_embedding = embeddings.weights.take("class_embedding", (width,)).to(dtype)
            self.first_norm = layer_norm(build, "pre_layrnorm", width, eps)
        self.layers = [TowerLayer(build.scope(f"encoder.layers.{n}"), vision) for n in range(vision.num_layers)]
        self.last_norm = None if vision.feature_layers else layer_norm(build, "post_layernorm", width, eps)
        self.feature_layers = vision.feature_layers

    def encode(self, pixels: Tensor) -> Layers:
        """pixels [B, 3, height, width] -> [B, N, H], or [B, N, H * number of feature layers]."""
        num_tiles, _, height, width = pixels.shape
        patch = self.patch_size
        grid = pixels.view(num_tiles, 3, height // patch, patch, width // patch, patch)
        x = self.patches(grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * patch * patch))
        x = x.view(num_tiles, -1, x.shape[1])
        if self.class_embedding is not None:
            x = torch.cat((self.class_embedding.expand(num_tiles, 1, -1), x), dim=1)
        x = x + self.positions
        if self.first_norm is not None:
            x = self.first_norm(x)
        features = {0: x}
        for index, layer in enumerate(self.layers, start=1):
            x = layer(x)
            if index in self.feature_layers:
                features[index] = x
            yield
        if self.last_norm is not None:
            return self.last_norm(x)
        return torch.cat([features[index] for index in self.feature_layers], dim=-1)


class TowerLayer:
    """Attention among the patches of a tile, and a plain MLP."""

    def __init__(self, build: Builder, vision: VisionConfig) -> None:
        width, inner, eps = vision.hidden_size, vision.intermediate_size, vision.norm_eps
        self.num_heads = vision.num_heads
        self.activation = activation_function(vision.activation)
        self.norm1 = layer_norm(build, "layer_norm1", width, eps)
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.qkv = vision_linear(build, dict.fromkeys(names, width), width)
        self.o = vision_linear(build, {"self_attn.out_proj": width}, width)
        self.norm2 = layer_norm(build, "layer_norm2", width, eps)
        self.up = vision_linear(build, {"mlp.fc1": inner}, width)
        self.down = vision_linear(build, {"mlp.fc2": width}, inner)

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, N, H] -> [B, N, H], a new tensor."""
        shape = x.shape
        qkv = self.qkv(self.norm1(x).flatten(0, 1)).view(*shape[:2], 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(attended.transpose(1, 2).reshape(-1, shape[2])).view(shape)
        inner = self.activation(self.up(self.norm2(x).flatten(0, 1)))
        return x + self.down(inner).view(shape)
