"""Granite-MoE: Granite's factors, and experts that are stored all in one tensor."""

from quire.models.moe import FUSED, ExpertNames, MoELlama


class GraniteMoE(MoELlama):
    """Llama's names around the experts."""

    layouts = (
        ExpertNames("block_sparse_moe", "router.layer", fused=("input_linear.weight", "output_linear.weight")),
        ExpertNames("block_sparse_moe", "router", fused=FUSED),
        ExpertNames("block_sparse_moe", "router.layer", one_by_one=("w1", "w3", "w2")),  # of GGUF
    )
