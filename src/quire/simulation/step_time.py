"""StepTime: how long a step takes on a device, from what it reads and what it computes.

Matrix products and attention run one after the other, so their times add up. Each is bound by what it reads or by
what it computes, whichever takes longer (Williams et al. 2009, the roofline); where a device's products were measured,
their curves take the place of that. To this come the all-reduces between devices and what a step costs besides.
"""

from bisect import bisect_left

from quire.errors import ConfigError
from quire.simulation.devices import Device
from quire.simulation.model_shapes import ModelShape


class StepTime:
    """Seconds of a step of `model` on `num_devices` of `device`, which share every layer (tensor parallel).

    Raises `ConfigError` for a model stored in a way that a measured device was not measured with.
    """

    def __init__(
        self, model: ModelShape, device: Device, num_devices: int = 1, *, attention_slowdown: float = 1.0
    ) -> None:
        spec = model.spec
        read_rate = num_devices * device.bandwidth * device.bandwidth_share
        self._matrix_rate = num_devices * device.matrix_rate * device.matrix_share
        # An input token reads one row of its embedding table, which is nothing; an untied one counts once.
        self._weights = (model.layer_bytes + model.head_bytes) / read_rate
        self._per_token = 2 * spec.active_layer_parameters / self._matrix_rate
        self._per_sample = 2 * spec.head.num_parameters / self._matrix_rate
        self._per_context_token = attention_slowdown * model.kv_bytes_per_token / read_rate
        self._per_pair = attention_slowdown * spec.operations_per_pair / self._matrix_rate
        self._curves: tuple[ProductCurve, ProductCurve] | None = None
        if device.products:
            shared = 1 / num_devices
            self._curves = (
                ProductCurve(device, model.weight_format, shared * spec.layer_parameters),
                ProductCurve(device, model.head_format, shared * spec.head.num_parameters),
            )
        self._overhead = device.step_overhead + spec.num_layers * device.layer_overhead
        self._per_sequence = device.sequence_overhead
        self._per_sample_drawn = spec.vocab_size * device.logit_time
        self._per_token_besides = spec.elements_per_token * device.element_time
        if num_devices > 1:
            self._overhead += 2 * spec.num_layers * device.reduce_latency
            if device.link_bandwidth:
                # A ring moves 2 (N − 1) / N of the data through every link.
                moved = 2 * (num_devices - 1) / num_devices * spec.hidden_size * model.dtype_bytes
                self._per_token_besides += 2 * spec.num_layers * moved / device.link_bandwidth

    def seconds(
        self, num_sequences: int, num_tokens: int, num_context_tokens: int, num_pairs: float, num_samples: int
    ) -> float:
        """The time of one step.

        `num_tokens` are computed, of `num_context_tokens` keys and values are read, in `num_pairs` (query, key)
        pairs attention is computed, and `num_samples` positions get logits.
        """
        if self._curves is not None:
            layers, head = self._curves
            matrix = layers.seconds(num_tokens) + head.seconds(num_samples)
        else:
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
            + num_tokens * self._per_token_besides
            + num_sequences * self._per_sequence
            + num_samples * self._per_sample_drawn
            + self._overhead
        )


class ProductCurve:
    """Seconds that all matrices of `num_parameters` parameters take, by the number of rows they are multiplied with."""

    def __init__(self, device: Device, weight_format: str, num_parameters: float) -> None:
        points = device.products.get(weight_format)
        if points is None:
            raise ConfigError(
                f"device {device.name} was not measured with weights in {weight_format}, only with "
                f"{', '.join(device.products)}; measure it again, or choose one of those"
            )
        self._rows = [row for row, _ in points]
        self._seconds = [seconds * num_parameters for _, seconds in points]

    def seconds(self, num_rows: int) -> float:
        """0 for no rows; linear between the measured points and beyond the last."""
        if num_rows <= 0:
            return 0.0
        rows, seconds = self._rows, self._seconds
        place = min(max(1, bisect_left(rows, num_rows)), len(rows) - 1)
        if num_rows <= rows[0]:
            return seconds[0]
        slope = (seconds[place] - seconds[place - 1]) / (rows[place] - rows[place - 1])
        return seconds[place] + slope * (num_rows - rows[place])
