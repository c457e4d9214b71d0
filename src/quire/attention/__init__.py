"""Plans a step's attention: ragged sequences become balanced work items that every layer reuses."""

from quire.attention.plan import CpuAttentionPlan, plan_attention
from quire.attention.planners import AttentionShape, Planner, make_planner

__all__ = ["AttentionShape", "CpuAttentionPlan", "Planner", "make_planner", "plan_attention"]
