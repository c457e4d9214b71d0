"""Plans a step's attention: ragged sequences become balanced work items that every layer reuses."""

from quire.attention.inputs import AttentionShape, StepArrays
from quire.attention.planners import Planner, make_planner

__all__ = ["AttentionShape", "Planner", "StepArrays", "make_planner"]
