"""DeepSeek-V2 and V3: latent attention, shared experts beside the others, dense layers first."""

import logging
from collections.abc import Iterator

from torch import Tensor

from quire.kernels import Kernels
from quire.model_config import ModelConfig
from quire.models.builder import Builder
from quire.models.decoder import DecoderLayer
from quire.models.latent_attention import latent_attention
from quire.models.llama import Llama
from quire.models.moe import MoELlama
from quire.models.weights import WeightScope

logger = logging.getLogger(__name__)


class DeepSeek(MoELlama):
    """Qwen-MoE's names around the experts. Further layers that predict later tokens are not loaded."""

    shared = "shared_experts"

    def __init__(
        self, config: ModelConfig, weights: WeightScope, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        further = list(_further_layers(config, weights))
        if further:
            found = ", ".join(map(str, further))
            logger.warning("layer %s of this checkpoint predicts a token after the next one; it is not used", found)
        self.ignored_tensors = (*Llama.ignored_tensors, *(rf"^(model\.)?layers\.{layer}\." for layer in further))
        super().__init__(config, weights, kernels, dtype, max_model_len)

    def make_layer(self, build: Builder, index: int, cos_sin: Tensor | None) -> DecoderLayer:
        return DecoderLayer(
            build.norm("input_layernorm"),
            latent_attention(build.scope("self_attn"), index, cos_sin),
            build.norm("post_attention_layernorm"),
            self.make_mlp(build, index),
        )


def _further_layers(config: ModelConfig, weights: WeightScope) -> Iterator[int]:
    """Layers behind the last one of config.json that join a hidden state with the embedding of a token."""
    layer = config.first_layer + config.num_layers
    while weights.has(f"model.layers.{layer}.eh_proj.weight"):
        yield layer
        layer += 1
