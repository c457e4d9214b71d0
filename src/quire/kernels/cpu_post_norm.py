"""`post_norm_layers_` of the CPU: all layers in one call, since calls and tensors count where texts are short."""

from collections.abc import Sequence

from torch import Tensor

from quire.kernels import _cpu
from quire.kernels.cpu_arguments import form_of, refuse_scales
from quire.kernels.interface import (
    AttentionParams,
    AttentionPlan,
    CpuAttentionPlan,
    DenseWeight,
    KVLayer,
    PostNormWeights,
    QuantizedWeight,
)


def post_norm_layers_(
    x: Tensor,
    layers: Sequence[PostNormWeights],
    num_heads: int,
    kv: KVLayer,
    plan: AttentionPlan,
    params: AttentionParams,
) -> None:
    assert isinstance(plan, CpuAttentionPlan)
    refuse_scales(kv)
    arguments = [
        (_dense(qkv), _dense(o), attention_norm, _dense(up), _dense(down), mlp_norm)
        for qkv, o, attention_norm, up, _, down, mlp_norm in layers
    ]
    tables = (plan.query_start_loc, plan.seq_lens, plan.block_tables)
    _cpu.post_norm_layers(
        x,
        arguments,
        num_heads,
        layers[0].up.num_outputs,
        f"plain_{layers[0].activation}",
        kv.keys,
        kv.values,
        plan.slots,
        (*tables, plan.work, plan.shared, plan.merges, plan.partials, plan.num_threads),
        params.scale,
        params.window,
        params.softcap,
    )


def _dense(dense: DenseWeight) -> "_cpu.Dense":
    packed = dense.packed
    if isinstance(packed, QuantizedWeight):
        return packed.values, dense.bias, (packed.scales, *form_of(packed.stored))
    assert isinstance(packed, Tensor)
    return packed, dense.bias, None
