"""Mixtral: Llama with experts in the place of the MLP."""

from quire.models.moe import FUSED, ExpertNames, MoELlama


class Mixtral(MoELlama):
    """Experts are stored one by one below `block_sparse_moe`, or all in one tensor below `mlp`."""

    layouts = (ExpertNames("block_sparse_moe", one_by_one=("w1", "w3", "w2")), ExpertNames(fused=FUSED))
