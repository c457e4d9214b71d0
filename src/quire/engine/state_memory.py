"""How much memory the recurrent states of a model take, and how many sequences can run at once with it."""

from dataclasses import dataclass

from quire.config import EngineConfig
from quire.engine.memory_budget import MemoryBudget
from quire.engine.memory_sizes import show_bytes
from quire.errors import MemoryPlanError
from quire.model_config import ModelConfig

STATE_SHARE = 0.5
"""By default states take at most this share of the memory for KV blocks and states."""


@dataclass(frozen=True, slots=True)
class StateMemory:
    """Slots for recurrent states: one for each sequence that runs, the others for snapshots of the prefix cache."""

    num_slots: int
    slot_bytes: int
    max_num_seqs: int
    """Sequences that run at once."""

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.slot_bytes


def plan_states(config: EngineConfig, model: ModelConfig, budget: MemoryBudget, share: float) -> StateMemory:
    """Two slots for each sequence that may run, or as many as fit; half of them are for running sequences.

    `share` of the memory left beside the other parts is for KV blocks and states. Raises `MemoryPlanError` where two
    slots do not fit.
    """
    slot = model.spec.state_bytes
    if not slot:
        return StateMemory(0, 0, config.max_num_seqs)
    if config.state_memory is None:
        num_slots = min(2 * config.max_num_seqs, int(budget.left * share * STATE_SHARE) // slot)
        room = f"{show_bytes(budget.left)} are left beside weights and activations; free memory or set state_memory"
    else:
        num_slots = config.state_memory // slot
        room = f"state_memory is {show_bytes(config.state_memory)}; raise it"
    if num_slots < 2:
        raise MemoryPlanError(
            f"the recurrent state of one sequence takes {show_bytes(slot)}, and a snapshot for the prefix cache as "
            f"much; {room}"
        )
    states = StateMemory(num_slots, slot, min(config.max_num_seqs, num_slots // 2))
    if states.num_bytes + budget.block > budget.left:
        raise MemoryPlanError(
            f"state_memory is {show_bytes(states.num_bytes)}, but beside weights and activations "
            f"{show_bytes(budget.left)} are left, and one KV block takes {show_bytes(budget.block)}; give less"
        )
    return states
