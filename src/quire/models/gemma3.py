"""Gemma 3 as it is published with a vision tower: its text model."""

from quire.kernels import Kernels
from quire.model_config import ModelConfig
from quire.models.gemma2 import Gemma2
from quire.models.weights import WeightScope


class Gemma3Text(Gemma2):
    """The tensors below `language_model`; those of the vision tower are not read."""

    ignored_tensors = (
        *Gemma2.ignored_tensors,
        r"^language_model\.lm_head\.weight$",
        r"^vision_tower\.",
        r"^multi_modal_projector\.",
    )

    def __init__(
        self, config: ModelConfig, weights: WeightScope, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        super().__init__(config, weights.scope("language_model"), kernels, dtype, max_model_len)
