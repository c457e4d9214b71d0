"""The image encoders of Qwen2-VL and Qwen2.5-VL: images of any shape, rotary embeddings by row and column.

Qwen2.5-VL has attention in windows, gated MLPs and RMSNorms; Qwen2-VL attends to the whole image, with plain MLPs and
LayerNorms.

Patches are kept in groups of merge × merge that become one token, N groups of P patches. Most layers attend within
windows of groups; windows at the right and lower edges are smaller. Windows of one size are computed as one batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from quire.layers.activation import activation_function
from quire.layers.linear import LinearWeight
from quire.layers.norm import Norm, RMSNorm
from quire.model_config import VisionConfig
from quire.models.builder import Builder
from quire.models.vision.encoder import Normaliser, Pieces, by_rows, num_rows_of_a_piece
from quire.models.vision.names import find_scope
from quire.models.vision.tower import layer_norm, num_products, vision_linear

_EPS, _THETA = 1e-6, 1e4


class _Step(NamedTuple):
    """What all layers read of one image."""

    cos: Tensor
    """[patches, 1, head_dim]"""
    sin: Tensor
    windows: Sequence[tuple[int, int]]
    """(number of windows, patches of each), in the order of the patches."""


class Qwen25VLEncoder:
    """Satisfies `ImageEncoder`."""

    def __init__(self, build: Builder, vision: VisionConfig) -> None:
        visual = find_scope(build, ("visual", "model.visual"), "patch_embed.proj.weight")
        width, patch, merge = vision.hidden_size, vision.patch_size, vision.merge
        self.vision = vision
        self.normalise = Normaliser(vision.processing, build.weights)
        # An image is a film of two equal frames: their weights are added once.
        frames = visual.weights.take("patch_embed.proj.weight", (width, 3, 2, patch, patch))
        self.patches = visual.pack(LinearWeight(frames.float().sum(dim=2).flatten(1)), quantizes=False)
        self.layers = [_Layer(visual.scope(f"blocks.{index}"), vision) for index in range(vision.num_layers)]
        self.norm = _norm(visual, "merger.ln_q", vision)
        merged = width * merge**2
        self.inner = vision_linear(visual, {"merger.mlp.0": merged}, merged)
        self.projector = vision_linear(visual, {"merger.mlp.2": vision.projector_width}, merged)

    def encode(self, tiles: Tensor, original_size: tuple[int, int]) -> Pieces:
        pixels = self.normalise(tiles)
        vision, (_, channels, height, width) = self.vision, pixels.shape
        patch, merge = vision.patch_size, vision.merge
        rows, columns = height // (patch * merge), width // (patch * merge)
        grid = pixels.view(channels, rows, merge, patch, columns, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
        order, windows = self._windows(rows, columns)
        order = order.to(pixels.device)
        group = merge**2
        values = grid.reshape(rows * columns * group, -1)
        x = yield from by_rows(self.patches, values, num_products(self.patches))
        x = x.view(-1, group, x.shape[1])[order].flatten(0, 1)
        angles = self._angles(rows, columns, pixels.device)[order].flatten(0, 1)
        step = _Step(angles.cos()[:, None], angles.sin()[:, None], windows)
        whole = step._replace(windows=[(1, len(x))])
        for index, layer in enumerate(self.layers):
            x = yield from layer(x, step if vision.has_window(index) else whole)
        merged = self.norm(x).view(rows * columns, -1)
        tokens = yield from by_rows(self._project, merged, num_products(self.inner, self.projector))
        return torch.empty_like(tokens).index_copy_(0, order, tokens)

    def work(self, tiles: Tensor) -> int:
        vision, (_, height, width, _) = self.vision, tiles.shape
        num_patches = height * width // vision.patch_size**2
        side = vision.window_size // vision.patch_size
        work = num_patches * num_products(self.patches)
        work += num_patches // vision.merge**2 * num_products(self.inner, self.projector)
        for index, layer in enumerate(self.layers):
            num_keys = min(side**2, num_patches) if vision.has_window(index) else num_patches
            work += num_patches * (num_products(layer.qkv) + layer.work_of_row(num_keys))
        return work

    def _project(self, merged: Tensor) -> Tensor:
        return self.projector(functional.gelu(self.inner(merged)))

    def _windows(self, rows: int, columns: int) -> tuple[Tensor, list[tuple[int, int]]]:
        """The order of groups in which windows of one size stand together, and (number, patches of each)."""
        side = self.vision.window_size // (self.vision.patch_size * self.vision.merge) or max(rows, columns)
        index = torch.arange(rows * columns).view(rows, columns)
        by_size: dict[int, list[Tensor]] = {}
        for top in range(0, rows, side):
            for left in range(0, columns, side):
                window = index[top : top + side, left : left + side].flatten()
                by_size.setdefault(len(window), []).append(window)
        order = torch.cat([window for windows in by_size.values() for window in windows])
        return order, [(len(windows), size * self.vision.merge**2) for size, windows in by_size.items()]

    def _angles(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """[N, P, head_dim]: how far each pair of elements turns, twice: for the first and the second half of a head."""
        merge, dim = self.vision.merge, self.vision.hidden_size // self.vision.num_heads // 2
        frequencies = 1.0 / _THETA ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
        y = torch.arange(rows * merge, device=device).view(rows, 1, merge, 1).expand(rows, columns, merge, merge)
        x = torch.arange(columns * merge, device=device).view(1, columns, 1, merge).expand(rows, columns, merge, merge)
        turned = torch.stack((y, x), dim=-1).reshape(rows * columns, merge**2, 2, 1) * frequencies
        return turned.flatten(2).repeat(1, 1, 2)


class _Layer:
    """Attention within windows or the whole image, and an MLP."""

    def __init__(self, build: Builder, vision: VisionConfig) -> None:
        width, inner = vision.hidden_size, vision.intermediate_size
        self.num_heads = vision.num_heads
        self.activation = activation_function(vision.activation)
        self.norm1, self.norm2 = _norm(build, "norm1", vision), _norm(build, "norm2", vision)
        self.qkv = vision_linear(build, {"attn.qkv": 3 * width}, width)
        self.o = vision_linear(build, {"attn.proj": width}, width)
        self.is_gated = vision.gated_mlp
        names = ("mlp.gate_proj", "mlp.up_proj") if self.is_gated else ("mlp.fc1",)
        self.up = vision_linear(build, dict.fromkeys(names, inner), width)
        self.down = vision_linear(build, {"mlp.down_proj" if self.is_gated else "mlp.fc2": width}, inner)

    def __call__(self, x: Tensor, step: _Step) -> Pieces:
        """x [patches, H] -> [patches, H], a new tensor."""
        projected = yield from by_rows(self._project, x, num_products(self.qkv))
        qkv = projected.view(len(x), 3, self.num_heads, -1)
        q, k, v = _rotated(qkv[:, 0], step), _rotated(qkv[:, 1], step), qkv[:, 2]
        most = num_rows_of_a_piece(x.device)
        done: list[Tensor] = []
        begin = 0
        for number, size in step.windows:
            # [windows, heads, patches of each, head_dim]
            queries, keys, values = (
                part[begin : begin + number * size].view(number, size, self.num_heads, -1).transpose(1, 2)
                for part in (q, k, v)
            )
            at_once = max(1, most // size)
            for first in range(0, number, at_once):
                some = slice(first, first + at_once)
                for row in range(0, size, most):
                    attended = functional.scaled_dot_product_attention(
                        queries[some, :, row : row + most], keys[some], values[some]
                    )
                    rows = attended.transpose(1, 2).flatten(0, 1).flatten(1)
                    place = begin + first * size + row
                    done.append(self._rest(x[place : place + len(rows)], rows))
                    yield len(rows) * self.work_of_row(size)
            begin += number * size
        return torch.cat(done)

    def work_of_row(self, num_keys: int) -> int:
        """Multiplications of a patch from attention on."""
        return num_products(self.o, self.up, self.down) + 2 * num_keys * self.o.num_inputs

    def _project(self, x: Tensor) -> Tensor:
        return self.qkv(self.norm1(x))

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention, for patches [n, H]."""
        x = x + self.o(attended)
        inner = self.up(self.norm2(x))
        if not self.is_gated:
            return x + self.down(self.activation(inner))
        gate, up = inner.chunk(2, dim=1)
        return x + self.down(self.activation(gate) * up)


def _rotated(x: Tensor, step: _Step) -> Tensor:
    """x [patches, heads, head_dim]: the halves of each head turned against each other."""
    first, second = x.float().chunk(2, dim=-1)
    return (x * step.cos + torch.cat((-second, first), dim=-1) * step.sin).to(x.dtype)


def _norm(build: Builder, name: str, vision: VisionConfig) -> Norm:
    if not vision.gated_mlp:
        return layer_norm(build, name, vision.hidden_size, _EPS)
    weight = build.weights.take(f"{name}.weight", (vision.hidden_size,))
    return RMSNorm(build.kernels, weight.float(), _EPS)
