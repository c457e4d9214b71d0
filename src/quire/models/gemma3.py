"""Gemma 3 as it is published with a vision tower: the layers of its text model, and an image encoder."""

from quire.kernels import Kernels
from quire.model_config import ModelConfig
from quire.models.builder import Builder
from quire.models.gemma2 import Gemma2
from quire.models.llama import DecoderNames
from quire.models.vision.gemma3 import Gemma3Encoder
from quire.models.weights import WeightScope


class Gemma3(Gemma2):
    """The text model has other names in checkpoints of other years."""

    ignored_tensors = (
        *Gemma2.ignored_tensors,
        r"^language_model\.lm_head\.weight$",
        # What SigLIP has beside its features.
        r"^(model\.)?vision_tower\.(.*\.)?head\.",
    )

    def __init__(
        self, config: ModelConfig, weights: WeightScope, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        new = weights.has("model.language_model.embed_tokens.weight")
        model = "model.language_model" if new else "language_model.model"
        self.names = DecoderNames(model, heads=("language_model.lm_head", "lm_head"))
        super().__init__(config, weights, kernels, dtype, max_model_len)
        if config.vision is None:
            self.ignored_tensors = (*self.ignored_tensors, r"^(model\.)?(vision_tower|multi_modal_projector)\.")
        else:
            self.image_encoder = Gemma3Encoder(
                Builder(config, weights.without_adapters(), kernels, dtype), config.vision
            )
