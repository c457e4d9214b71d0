"""StepTime: how long a step takes on a device, from what it reads and what it computes.

Matrix products and attention run one after the other, so their times add up. Each is bound by what it reads or by
what it computes, whichever takes longer (Williams et al. 2009, the roofline). To this come the all-reduces between
devices and a step's overhead.
"""

from quire.simulation.devices import Device
from quire.simulation.model_shapes import ModelShape


class StepTime:
    """Seconds of a step of `model` on `num_devices` of `device`, which share every layer (tensor parallel)."""

    def __init__(
        self, model: ModelShape, device: Device, num_devices: int = 1, *, attention_slowdown: float = 1.0
    ) -> None:
        read_rate = num_devices * device.bandwidth * device.bandwidth_share
        self._matrix_rate = num_devices * device.matrix_rate * device.matrix_share
        # An input token reads one row of its embedding table, which is nothing; an untied one counts once.
        parameters = model.num_layer_parameters + model.num_head_parameters
        self._weights = parameters * model.dtype_bytes / read_rate
        self._per_token = 2 * model.num_layer_parameters / self._matrix_rate
        self._per_sample = 2 * model.num_head_parameters / self._matrix_rate
        self._per_context_token = attention_slowdown * model.kv_bytes_per_token / read_rate
        # Scores and their product with the values: two products of head_dim per query head, key and layer.
        pair = 4 * model.num_layers * model.num_heads * model.head_dim
        self._per_pair = attention_slowdown * pair / self._matrix_rate
        self._overhead, self._per_sequence = device.step_overhead, device.sequence_overhead
        if num_devices > 1:
            self._overhead += 2 * model.num_layers * device.reduce_latency
            if device.link_bandwidth:
                # A ring moves 2 (N − 1) / N of the data through every link.
                moved = 2 * (num_devices - 1) / num_devices * model.hidden_size * model.dtype_bytes
                self._per_token_moved = 2 * model.num_layers * moved / device.link_bandwidth
            else:
                self._per_token_moved = 0.0
        else:
            self._per_token_moved = 0.0

    def seconds(
        self, num_sequences: int, num_tokens: int, num_context_tokens: int, num_pairs: float, num_samples: int
    ) -> float:
        """The time of one step.

        `num_tokens` are computed, of `num_context_tokens` keys and values are read, in `num_pairs` (query, key)
        pairs attention is computed, and `num_samples` positions get logits.
        """
        matrix = num_tokens * self._per_token + num_samples * self._per_sample
        if matrix < self._weights:
            matrix = self._weights
        attention = num_context_tokens * self._per_context_token
        computed = num_pairs * self._per_pair
        if attention < computed:
            attention = computed
        return (
            matrix
            + attention
            + num_tokens * self._per_token_moved
            + num_sequences * self._per_sequence
            + self._overhead
        )
