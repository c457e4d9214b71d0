"""StepTime: how long a step takes on a device, from what it reads and what it computes.

Matrix products and attention run one after the other, so their times add up. Each is bound by what it reads or by
what it computes, whichever takes longer (Williams et al. 2009, the roofline); where a device's products were measured,
their curves take the place of that. All-reduces between devices and fixed costs of a step come on top.

A step reads dense layers once. It reads the experts that its tokens are sent to: the top-k of one token, up to k more
with each further token, at most all of them.
"""

from bisect import bisect_left

from quire.errors import ConfigError
from quire.quantization import METHODS
from quire.simulation.devices import Device
from quire.simulation.model_shapes import ModelShape


class StepTime:
    """Seconds of a step of `model` on `num_devices` of `device`, which share every layer (tensor parallel).

    Raises `ConfigError` if the device was measured, but not with weights stored as the model's are.
    """

    def __init__(
        self, model: ModelShape, device: Device, num_devices: int = 1, *, attention_slowdown: float = 1.0
    ) -> None:
        spec = model.spec
        read_rate = num_devices * device.bandwidth * device.bandwidth_share
        matrix_rate = num_devices * device.matrix_rate * device.matrix_share
        self._products: RooflineProducts | MeasuredProducts
        if device.products:
            self._products = MeasuredProducts(model, device, num_devices)
        else:
            self._products = RooflineProducts(model, read_rate=read_rate / model.weight_share, matrix_rate=matrix_rate)
        self._per_context_token = attention_slowdown * model.kv_bytes_per_token / read_rate
        self._per_pair = attention_slowdown * spec.operations_per_pair / matrix_rate
        self._overhead = device.step_overhead + spec.num_layers * device.layer_overhead
        self._per_sequence = device.sequence_overhead
        self._per_sample = spec.vocab_size * device.logit_time
        self._per_token = spec.elements_per_token * device.element_time
        if num_devices > 1:
            self._overhead += 2 * spec.num_layers * device.reduce_latency
            if device.link_bandwidth:
                # A ring moves 2 (N − 1) / N of the data through every link.
                moved = 2 * (num_devices - 1) / num_devices * spec.hidden_size * model.dtype_bytes
                self._per_token += 2 * spec.num_layers * moved / device.link_bandwidth

    def seconds(
        self, num_sequences: int, num_tokens: int, num_context_tokens: int, num_pairs: float, num_samples: int
    ) -> float:
        """The time of one step of `num_sequences` that computes `num_tokens`.

        Attention reads the keys and values of `num_context_tokens` and computes `num_pairs` (query, key) pairs;
        `num_samples` positions get logits.
        """
        attention = num_context_tokens * self._per_context_token
        computed = num_pairs * self._per_pair
        if attention < computed:
            attention = computed
        return (
            self._products.seconds(num_tokens, num_samples)
            + attention
            + num_tokens * self._per_token
            + num_sequences * self._per_sequence
            + num_samples * self._per_sample
            + self._overhead
        )


class RooflineProducts:
    """Matrix products of a step by two rates: bytes read per second, and operations per second."""

    def __init__(self, model: ModelShape, *, read_rate: float, matrix_rate: float) -> None:
        spec = model.spec
        weight_format = METHODS[model.quantization].layers if model.quantization is not None else None
        # An input token reads one row of its embedding table, which is nothing; a tied table is read as the head.
        always_read = model.layer_bytes + model.head_bytes
        self._experts = []
        """Kinds of experts, each with the seconds to read one expert in all its layers."""
        for experts, num_layers in spec.expert_layers:
            expert = num_layers * sum(each.weight_bytes(model.dtype, weight_format) for each in experts.expert.linears)
            always_read -= experts.num_experts * expert
            self._experts.append((experts, expert / read_rate))
        self._read = always_read / read_rate
        self._per_token = 2 * spec.active_layer_parameters / matrix_rate
        self._per_sample = 2 * spec.num_head_parameters / matrix_rate

    def seconds(self, num_tokens: int, num_samples: int) -> float:
        """The longer of reading the weights and computing the products."""
        read = self._read
        for experts, per_expert in self._experts:
            read += experts.num_read(num_tokens) * per_expert
        computed = num_tokens * self._per_token + num_samples * self._per_sample
        return computed if computed > read else read


class MeasuredProducts:
    """Matrix products of a step by the curves of a measured device."""

    def __init__(self, model: ModelShape, device: Device, num_devices: int) -> None:
        spec, shared = model.spec, 1 / num_devices
        dense = spec.layer_parameters
        self._experts = []
        """Kinds of experts, each with the curve of one expert in all its layers."""
        for experts, num_layers in spec.expert_layers:
            expert = num_layers * experts.expert.num_parameters
            dense -= experts.num_experts * expert
            self._experts.append((experts, ProductCurve(device, model.weight_format, shared * expert)))
        self._layers = ProductCurve(device, model.weight_format, shared * dense)
        self._head = ProductCurve(device, model.head_format, shared * spec.num_head_parameters)

    def seconds(self, num_tokens: int, num_samples: int) -> float:
        """Dense layers see every token, an expert its share of them."""
        seconds = self._layers.seconds(num_tokens) + self._head.seconds(num_samples)
        for experts, curve in self._experts:
            num_read = experts.num_read(num_tokens)
            if num_read:
                seconds += num_read * curve.seconds(num_tokens * experts.num_active / num_read)
        return seconds


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

    def seconds(self, num_rows: float) -> float:
        """0 for no rows; linear between the measured points and beyond the last."""
        if num_rows <= 0:
            return 0.0
        rows, seconds = self._rows, self._seconds
        place = min(max(1, bisect_left(rows, num_rows)), len(rows) - 1)
        if num_rows <= rows[0]:
            return seconds[0]
        slope = (seconds[place] - seconds[place - 1]) / (rows[place] - rows[place - 1])
        return seconds[place] + slope * (num_rows - rows[place])
