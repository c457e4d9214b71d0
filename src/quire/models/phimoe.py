"""Phi-3.5-MoE: LayerNorms with bias, and two experts that are chosen one after the other."""

from quire.models.moe import FUSED, ExpertNames, MoELlama


class PhiMoE(MoELlama):
    """Mixtral's names in published checkpoints."""

    layouts = (
        ExpertNames("block_sparse_moe", one_by_one=("w1", "w3", "w2")),
        ExpertNames(router="router", fused=FUSED),
    )
