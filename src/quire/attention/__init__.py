"""Plans a step's attention: ragged sequences become balanced work items that every layer reuses."""

from quire.attention.plan import CpuAttentionPlan, plan_attention
from quire.attention.planners import AttentionShape, Planner, StepArrays, make_planner

__all__ = ["AttentionShape", "CpuAttentionPlan", "Planner", "StepArrays", "make_planner", "plan_attention"]
