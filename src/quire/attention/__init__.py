"""Plans a step's attention: ragged sequences become balanced work items that every layer reuses."""

from quire.attention.plan import CpuAttentionPlan, plan_attention

__all__ = ["CpuAttentionPlan", "plan_attention"]
