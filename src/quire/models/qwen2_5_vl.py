"""Qwen2-VL and Qwen2.5-VL: the layers of Qwen2, rotated by three positions a token, and an image encoder."""

from dataclasses import replace

import torch
from torch import Tensor

from quire.kernels import Kernels
from quire.layers.rotary import cos_sin_table
from quire.layers.step_context import RotaryRows, StepContext
from quire.model_config import ModelConfig
from quire.models.builder import Builder
from quire.models.llama import DecoderNames, Llama
from quire.models.vision.qwen2_5_vl import Qwen25VLEncoder
from quire.models.weights import WeightScope


class Qwen25VL(Llama):
    """A step whose tokens have one position each is one of Qwen2; others get a table of their own."""

    def __init__(
        self, config: ModelConfig, weights: WeightScope, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        old = weights.has("model.embed_tokens.weight")
        self.names = DecoderNames("model" if old else "model.language_model")
        super().__init__(config, weights, kernels, dtype, max_model_len)
        assert config.vision is not None
        assert config.rope is not None
        device = getattr(weights.source, "device", torch.device("cpu"))
        self.sections = config.rope.sections
        self.table = cos_sin_table(config.rope, config.head_dim, max_model_len).to(device)
        self.image_encoder = Qwen25VLEncoder(Builder(config, weights.without_adapters(), kernels, dtype), config.vision)

    def __call__(self, input_ids: Tensor, context: StepContext) -> Tensor:
        if context.grid_positions is not None:
            context = replace(context, rotary_rows=self._rows(context.grid_positions))
        return super().__call__(input_ids, context)

    def _rows(self, positions: Tensor) -> RotaryRows:
        """positions int32 [3, T]: each section of the frequencies turns by another of them."""
        cosines, sines = self.table.chunk(2, dim=1)
        parts = []
        for table in (cosines, sines):
            pieces = zip(positions, table.split(self.sections, dim=1), strict=True)
            parts += [piece[position] for position, piece in pieces]
        indices = torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device)
        return RotaryRows(indices, torch.cat(parts, dim=1))
