"""Idefics3 and SmolVLM: the layers of Llama, and an image encoder."""

from quire.kernels import Kernels
from quire.model_config import ModelConfig
from quire.models.builder import Builder
from quire.models.llama import DecoderNames, Llama
from quire.models.vision.idefics3 import Idefics3Encoder
from quire.models.weights import WeightScope


class Idefics3(Llama):
    """The text model is `model.text_model`."""

    names = DecoderNames("model.text_model")

    def __init__(
        self, config: ModelConfig, weights: WeightScope, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        super().__init__(config, weights, kernels, dtype, max_model_len)
        assert config.vision is not None
        self.image_encoder = Idefics3Encoder(Builder(config, weights, kernels, dtype), config.vision)
