"""StepContext: what one step gives to every layer besides the tokens' hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from quire.kernels import AttentionPlan, KVLayer, OutputTokens
from quire.kernels.interface import StateLayer
from quire.kernels.recurrent_plan import RecurrentPlan


class InputRows(NamedTuple):
    """Hidden states that take the place of the embeddings of some tokens of a step."""

    tokens: Tensor
    """[N] int64: indices among the step's tokens."""
    rows: Tensor
    """[N, H]"""


class RotaryRows(NamedTuple):
    """A table of cosines and sines made for one step, in the place of that of all positions."""

    indices: Tensor
    """[T] int32: the row of each token."""
    cos_sin: Tensor
    """[T, rotary_dim] float32"""


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step as model, layers and kernels see it. T new tokens of all sequences."""

    positions: Tensor
    """[T] int32: position of each new token in its sequence."""
    kv_layers: Sequence[KVLayer]
    """The KV cache, one entry for each layer that has keys and values."""
    attention: Sequence[AttentionPlan]
    """One plan for each KV group; a layer reads that of its `KVLayer.group`."""
    output_tokens: OutputTokens | None = None
    """The tokens whose hidden states are read; None: all of them."""
    state_layers: Sequence[StateLayer] = ()
    """The states of recurrent layers, one entry each."""
    recurrence: RecurrentPlan | None = None
    """The plan of these layers; None in a model without."""
    token_types: Tensor | None = None
    """[T] int32: 1 for the tokens of a pair's second text, else 0; None where all are 0."""
    text_starts: Sequence[int] | None = None
    """[B + 1]: where the tokens of each sequence begin among those of the step, and the end of all."""
    grid_positions: Tensor | None = None
    """[3, T] int32: temporal, vertical and horizontal position of each token, in a model that has them; None where the
    three are `positions`."""
    rotary_rows: RotaryRows | None = None
    """Set by such a model."""
    input_rows: InputRows | None = None
    """The embeddings of images; None where the step computes none of their tokens."""

    @property
    def for_inner_layers(self) -> "StepContext":
        """The same step for layers before the last: they compute every token, since later layers need its keys."""
        return self if self.output_tokens is None else replace(self, output_tokens=None)

    def select_output(self, x: Tensor) -> Tensor:
        """x [T, ...] -> the rows of the output tokens [R, ...]; x itself where all tokens are read."""
        return x if self.output_tokens is None else x[self.output_tokens.tokens]
