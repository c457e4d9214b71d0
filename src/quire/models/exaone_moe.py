"""EXAONE-MoE (K-EXAONE): the experts of GLM-4.5, and layers with a window that alone rotate queries and keys."""

from quire.models.builder import Builder
from quire.models.llama import Llama
from quire.models.moe import ExpertNames, MoELlama
from quire.models.weights import WeightScope


class ExaoneMoE(MoELlama):
    """Qwen-MoE's names. What predicts the token after the next one (mtp) is not loaded, as in transformers."""

    ignored_tensors = (*Llama.ignored_tensors, r"^mtp\.")
    shared = "shared_experts"

    def router_scope(self, block: Builder, names: ExpertNames) -> WeightScope:
        """Published files keep the router's bias beside its matrix, not below it."""
        is_beside = block.weights.has("e_score_correction_bias")
        return block.weights if is_beside else super().router_scope(block, names)
