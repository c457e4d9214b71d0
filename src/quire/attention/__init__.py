"""Plans a step's attention: ragged sequences become balanced work items that every layer reuses."""

from quire.attention.plan import AttentionPlan, plan_attention

__all__ = ["AttentionPlan", "plan_attention"]
