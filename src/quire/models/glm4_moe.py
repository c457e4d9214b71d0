"""GLM-4.5: a sigmoid router whose choice a bias moves, shared experts, and dense layers first."""

from quire.models.llama import Llama
from quire.models.moe import MoELlama


class Glm4MoE(MoELlama):
    """Qwen-MoE's names. Published checkpoints hold a further layer that predicts the token after the next one; as in
    transformers it is not loaded."""

    # GLM-4.5-Air has 46 layers, GLM-4.5 has 92.
    ignored_tensors = (*Llama.ignored_tensors, r"^model\.layers\.(46|92)\.")
    shared = "shared_experts"
