"""LLaVA 1.5 and 1.6: the layers of Llama, Mistral or Qwen2, and an image encoder."""

from quire.kernels import Kernels
from quire.model_config import ModelConfig
from quire.models.builder import Builder
from quire.models.llama import DecoderNames, Llama
from quire.models.vision.llava import LlavaEncoder
from quire.models.weights import WeightScope


class Llava(Llama):
    """The text model and the tower have other names in checkpoints of other years."""

    ignored_tensors = (
        *Llama.ignored_tensors,
        r"^language_model\.lm_head\.weight$",
        # Layers after the last feature, and what follows them.
        r"^(model\.)?vision_tower\..*(encoder\.layers\.\d+\.|post_layernorm\.)",
    )

    def __init__(
        self, config: ModelConfig, weights: WeightScope, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        old = weights.has("language_model.model.embed_tokens.weight")
        model = "language_model.model" if old else "model.language_model"
        self.names = DecoderNames(model, heads=("language_model.lm_head", "lm_head"))
        super().__init__(config, weights, kernels, dtype, max_model_len)
        assert config.vision is not None
        self.image_encoder = LlavaEncoder(Builder(config, weights.without_adapters(), kernels, dtype), config.vision)
