"""Plans a step's attention: ragged sequences become balanced work items that every layer reuses."""

from quire.attention.inputs import ALL_POSITIONS, AttentionShape, StepArrays
from quire.attention.planners import GroupPlanner, Planner, make_planner, variant_of

__all__ = ["ALL_POSITIONS", "AttentionShape", "GroupPlanner", "Planner", "StepArrays", "make_planner", "variant_of"]
