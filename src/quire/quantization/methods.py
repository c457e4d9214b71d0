"""METHODS: one row for each quantisation, by the name that `quantization` and `--quantization` take."""

from dataclasses import dataclass

ROTATED = 64
"""Inputs that a rotation mixes."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How one dense layer is stored: integers of few bits in groups of inputs. The rows that it is multiplied with are
    brought to 8 bits in the same groups."""

    bits: int
    """8: a group has a bfloat16 scale. 4: it has a scale and an offset of one byte each, in units of their output."""
    group_size: int
    """Inputs that share a scale: a multiple of 32, or at least all inputs, which makes one group of them."""
    rotates: bool = False
    """Whole groups are multiplied with an orthogonal matrix, in the weights and in the rows; their size is ROTATED.
    An outlier then no longer sets the scale of its group alone."""

    def weight_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Memory of a weight [num_outputs, num_inputs] and its scales."""
        num_groups = -(-num_inputs // self.group_size)
        units = 4 if self.bits == 4 else 0
        return num_outputs * (num_inputs * self.bits // 8 + 2 * num_groups + units)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A row of METHODS. Norms, biases, routers of experts and tables that only give rows are never quantised; a tied
    embedding reads its rows from the head."""

    layers: WeightFormat
    """Format of the dense layers of attention, MLPs and experts."""
    head: WeightFormat
    """Format of the layer that makes logits, and of layers that need more bits than `layers` has."""
    extra_bits: float = 0.0
    """Bits for each weight of the layers, on average, that may be spent on those which `layers` changes most. A model
    with experts has no such layers."""

    def extra_bytes(self, num_parameters: int) -> int:
        """Memory by which layers of so many weights may grow."""
        return int(num_parameters * self.extra_bits / 8)


_INT8 = WeightFormat(8, ROTATED, rotates=True)

METHODS: dict[str, Method] = {
    "int8": Method(layers=_INT8, head=_INT8),
    # An error in the head goes straight into the logits; 8 bits there cost little.
    "int4": Method(layers=WeightFormat(4, 32), head=_INT8, extra_bits=0.3),
    # Half as many groups: a quarter less time for many rows, and a larger error.
    "int4-fast": Method(layers=WeightFormat(4, 64), head=_INT8),
}
