"""METHODS: one row for each quantisation, by the name that `quantization` and `--quantization` take."""

from dataclasses import dataclass

_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How one dense layer is stored: integers of `bits` bits, and a float32 scale for each group of inputs."""

    bits: int
    group_size: int | None
    """None: one scale for all inputs of an output."""

    def inputs_per_scale(self, num_inputs: int) -> int:
        """The group size that kernels take. They read inputs in steps of 8, and a group must not end inside a step."""
        return self.group_size or -(-num_inputs // 8) * 8

    def weight_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Memory of a weight [num_outputs, num_inputs] and its scales."""
        num_groups = -(-num_inputs // (self.group_size or num_inputs))
        return num_outputs * (num_inputs * self.bits // 8 + num_groups * _SCALE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A row of METHODS. Norms, biases, routers of experts and tables that only give rows are never quantised; a tied
    embedding reads its rows from the head."""

    layers: WeightFormat
    """Format of the dense layers of attention, MLPs and experts."""
    head: WeightFormat
    """Format of the layer that makes logits."""


_INT8 = WeightFormat(8, None)

METHODS: dict[str, Method] = {
    "int8": Method(layers=_INT8, head=_INT8),
    # An error in the head goes straight into the logits; 8 bits there cost little.
    "int4": Method(layers=WeightFormat(4, 64), head=_INT8),
}
