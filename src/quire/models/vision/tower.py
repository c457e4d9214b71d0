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
from quire.models.vision.encoder import Pieces, by_rows, num_rows_of_a_piece


def vision_linear(build: Builder, rows: Mapping[str, int], num_inputs: int, *, bias: bool = True) -> Linear:
    """One layer from several stored ones, outputs side by side, in floats whatever the quantisation."""
    take = build.weights.take_linear
    return build.pack(*(take(name, (count, num_inputs), bias=bias) for name, count in rows.items()), quantizes=False)


def num_products(*layers: Linear) -> int:
    """Multiplications of one row in these layers."""
    return sum(layer.num_inputs * layer.num_outputs for layer in layers)


def patch_embedding(build: Builder, name: str, width: int, shape: tuple[int, ...], *, bias: bool) -> Linear:
    """A convolution over patches as a dense layer over their values. `shape` is that of a patch: channels first."""
    weight = build.weights.take(f"{name}.weight", (width, *shape)).flatten(1)
    stored = LinearWeight(weight, build.weights.take(f"{name}.bias", (width,)) if bias else None)
    return build.pack(stored, quantizes=False)


def layer_norm(build: Builder, name: str, width: int, eps: float) -> LayerNorm:
    dtype = build.weights.activation_dtype
    weight, bias = (build.weights.take(f"{name}.{part}", (width,)).to(dtype) for part in ("weight", "bias"))
    return LayerNorm(build.kernels, weight, bias, eps)


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

    def encode(self, pixels: Tensor) -> Pieces:
        """pixels [B, 3, height, width] -> [B, N, H], or [B, N, H * number of feature layers]."""
        num_tiles, _, height, width = pixels.shape
        patch = self.patch_size
        grid = pixels.view(num_tiles, 3, height // patch, patch, width // patch, patch)
        values = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * patch * patch)
        x = yield from by_rows(self.patches, values, num_products(self.patches))
        x = x.view(num_tiles, -1, x.shape[1])
        if self.class_embedding is not None:
            x = torch.cat((self.class_embedding.expand(num_tiles, 1, -1), x), dim=1)
        x = x + self.positions
        if self.first_norm is not None:
            x = self.first_norm(x)
        features = {0: x}
        for index, layer in enumerate(self.layers, start=1):
            x = yield from layer(x)
            if index in self.feature_layers:
                features[index] = x
        if self.last_norm is not None:
            return self.last_norm(x)
        return torch.cat([features[index] for index in self.feature_layers], dim=-1)

    def work(self, num_tiles: int) -> int:
        """About as many multiplications as `encode` tells for so many tiles."""
        num_rows = num_tiles * len(self.positions)
        return num_rows * num_products(self.patches) + num_tiles * sum(
            layer.work(len(self.positions)) for layer in self.layers
        )


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

    def __call__(self, x: Tensor) -> Pieces:
        """x [B, N, H] -> [B, N, H], a new tensor."""
        num_tiles, num_rows, _ = x.shape
        qkv = yield from by_rows(self._project, x.flatten(0, 1), num_products(self.qkv))
        q, k, v = qkv.view(num_tiles, num_rows, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        size = num_rows_of_a_piece(x.device)
        tiles_at_once = max(1, size // num_rows)
        done = []
        for tile in range(0, num_tiles, tiles_at_once):
            tiles = slice(tile, tile + tiles_at_once)
            for row in range(0, num_rows, size):
                rows = slice(row, row + size)
                attended = functional.scaled_dot_product_attention(q[tiles, :, rows], k[tiles], v[tiles])
                done.append(self._rest(x[tiles, rows], attended.transpose(1, 2).flatten(2)).flatten(0, 1))
                yield len(done[-1]) * self._work_of_row(num_rows)
        return torch.cat(done).view(x.shape)

    def work(self, num_rows: int) -> int:
        """Multiplications of a tile of so many rows."""
        return num_rows * (num_products(self.qkv) + self._work_of_row(num_rows))

    def _project(self, x: Tensor) -> Tensor:
        return self.qkv(self.norm1(x))

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention, for rows [B, n, H]."""
        shape = x.shape
        x = x + self.o(attended.flatten(0, 1)).view(shape)
        inner = self.activation(self.up(self.norm2(x).flatten(0, 1)))
        return x + self.down(inner).view(shape)

    def _work_of_row(self, num_keys: int) -> int:
        return num_products(self.o, self.up, self.down) + 2 * num_keys * self.o.num_inputs
