"""ERNIE 4.5 with experts: a softmax router whose choice a bias moves, shared experts, and dense layers first."""

from quire.models.llama import Llama
from quire.models.moe import MoELlama


class Ernie4_5MoE(MoELlama):
    """Qwen-MoE's names. Published checkpoints hold layers that predict tokens after the next one; as in transformers
    they are not loaded."""

    ignored_tensors = (*Llama.ignored_tensors, r"^model\.mtp_")
    shared = "shared_experts"
    router_vectors = "moe_statics"
