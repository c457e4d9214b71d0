"""attend_expanded: attention of many new tokens of a sequence over keys and values that are made of its latent rows."""

from dataclasses import replace

import torch
from torch import Tensor

from quire.kernels import AttentionParams, Kernels, KVLayer
from quire.kernels.interface import ExpandedRun
from quire.kernels.reference import stored_kv
from quire.layers.linear import Linear


def attend_expanded(
    kernels: Kernels,
    queries: Tensor,
    kv: KVLayer,
    run: ExpandedRun,
    params: AttentionParams,
    key_up: list[Linear],
    value_up: list[Linear],
) -> Tensor:
    """queries [n, heads, D] of the run's tokens, rotated elements first -> [n, heads x value elements].

    `key_up` are the layers that are applied to queries otherwise, `value_up` those that make values. One head is
    computed after the other, so that the keys and values of one are held.
    """
    stored, _ = stored_kv(replace(kv, keys=kv.keys[run.blocks], values=kv.values[run.blocks]), torch.float32)
    num_blocks, _, _, block_size = stored.shape
    rows = stored.permute(0, 3, 1, 2).flatten(0, 1)[: len(run.plan.slots)]  # [tokens, 1, elements of a row]
    head_dim, latent_dim = queries.shape[2], kv.values.shape[3]
    rope_dim = rows.shape[2] - latent_dim
    latents = rows[:, 0, rope_dim:].contiguous()
    keys = torch.empty(len(rows), 1, head_dim)
    keys[..., :rope_dim] = rows[..., :rope_dim]
    shape, _ = kernels.kv_cache_shapes(num_blocks, 1, block_size, head_dim)
    own = KVLayer(torch.empty(shape), torch.empty(num_blocks, 1, block_size, value_up[0].num_outputs))
    outputs = []
    for head, (key, value) in enumerate(zip(key_up, value_up, strict=True)):
        keys[:, 0, rope_dim:] = latents @ key.unpacked()
        kernels.write_kv(keys, value(latents).unsqueeze(1), own, run.plan.slots)
        outputs.append(kernels.paged_attention(queries[:, head : head + 1], own, run.plan, params)[:, 0])
    return torch.cat(outputs, dim=1)
