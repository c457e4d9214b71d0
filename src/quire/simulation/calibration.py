"""fit_device: the coefficients of a device, fitted to steps that were timed on it.

Every coefficient of `StepTime` for a measured device enters a step's time linearly, and none can be negative. So they
are the non-negative least squares solution for the measured times (Lawson and Hanson 1974), with relative errors. A
curve of products is a sum of rises between its points, which keeps it ascending.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from quire.dtypes import DTYPE_BYTES
from quire.errors import QuireError
from quire.simulation.devices import Device
from quire.simulation.model_shapes import ModelShape

_SHARED = ("step_overhead", "layer_overhead", "sequence_overhead", "element_time", "logit_time", "read", "pair")
"""Unknowns besides the curves. The last two are seconds per byte of KV and per operation of attention."""


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One step of known work, in which every sequence computes one token, or every sequence its whole prompt."""

    model: ModelShape
    num_sequences: int
    tokens_per_sequence: int
    context: int
    """Tokens of each sequence before the computed ones."""
    seconds: float

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.tokens_per_sequence


def fit_device(steps: Sequence[TimedStep], *, name: str, memory: float, process_memory: float) -> Device:
    """The device on which `steps` would take the measured times. Raises `QuireError` if they do not determine it."""
    formats = dict.fromkeys(step.model.weight_format for step in steps)
    # A curve has a point for every measured number of rows: tokens in the layers, sequences in the head.
    knots = {each: sorted(_rows_of(steps, each)) for each in formats}
    columns: list[tuple[str, int]] = [(shared, 0) for shared in _SHARED]
    columns += [(each, row) for each, rows in knots.items() for row in rows]
    place = {column: index for index, column in enumerate(columns)}
    matrix = []
    for step in steps:
        model, line = step.model, [0.0] * len(columns)
        for shared, amount in zip(_SHARED, _shared_work(step), strict=True):
            line[place[shared, 0]] = amount
        for weight_format, num_rows, num_parameters in (
            (model.weight_format, step.num_tokens, model.spec.layer_parameters),
            (model.head_format, step.num_sequences, model.spec.num_head_parameters),
        ):
            for row in knots.get(weight_format, ()):
                line[place[weight_format, row]] += num_parameters if row <= num_rows else 0
        matrix.append([amount / step.seconds for amount in line])
    fitted = dict(zip(columns, non_negative_least_squares(matrix, [1.0] * len(steps)), strict=True))
    products = {}
    for each, rows in knots.items():
        products[each] = list(zip(rows, accumulate(fitted[each, row] for row in rows), strict=True))
    overheads = {shared: fitted[shared, 0] for shared in _SHARED}
    if any(len(curve) < 2 or not curve[-1][1] for curve in products.values()):
        raise QuireError("the steps' times do not tell what the device can do; let nothing else run, and measure again")
    products = {each: _without_zeros(curve) for each, curve in products.items()}
    read = overheads["read"] or _seconds_per_byte(products)
    pair = overheads["pair"] or _seconds_per_operation(products)
    return Device(
        name=name,
        memory=memory,
        bandwidth=1 / read,
        matrix_rate=1 / pair,
        process_memory=process_memory,
        products=products,
        step_overhead=overheads["step_overhead"],
        layer_overhead=overheads["layer_overhead"],
        sequence_overhead=overheads["sequence_overhead"],
        element_time=overheads["element_time"],
        logit_time=overheads["logit_time"],
    )


def _without_zeros(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A curve whose first points came out as 0, because other programs slowed those steps: they take as long as the
    first point that did not."""
    least = next(seconds for _, seconds in curve if seconds)
    return [(rows, seconds or least) for rows, seconds in curve]


def _seconds_per_byte(products: Mapping[str, Sequence[tuple[int, float]]]) -> float:
    """For attention whose rate of reading did not show beside other work: that of reading weights."""
    return min(curve[0][1] / DTYPE_BYTES.get(each, 1) for each, curve in products.items())


def _seconds_per_operation(products: Mapping[str, Sequence[tuple[int, float]]]) -> float:
    """The same for the rate of computing: that of the widest product."""
    return min(curve[-1][1] / (2 * curve[-1][0]) for curve in products.values())


def _rows_of(steps: Sequence[TimedStep], weight_format: str) -> set[int]:
    layers = {step.num_tokens for step in steps if step.model.weight_format == weight_format}
    return layers | {step.num_sequences for step in steps if step.model.head_format == weight_format}


def _shared_work(step: TimedStep) -> tuple[float, ...]:
    """How often each of `_SHARED` counts in a step."""
    model, count = step.model, step.tokens_per_sequence
    # Attention is bound by reading where sequences compute one token, by computing where they compute many.
    decodes = count == 1
    pairs = step.num_sequences * (count * step.context + count * (count + 1) / 2)
    operations = model.spec.operations_per_pair * pairs
    return (
        1,
        model.spec.num_layers,
        step.num_sequences,
        step.num_tokens * model.spec.elements_per_token,
        step.num_sequences * model.spec.vocab_size,
        step.num_sequences * (step.context + 1) * model.kv_bytes_per_token if decodes else 0,
        0 if decodes else operations,
    )


def non_negative_least_squares(matrix: Sequence[Sequence[float]], target: Sequence[float]) -> list[float]:
    """The x ≥ 0 with the least |matrix x − target|, by Lawson and Hanson's active sets."""
    import numpy as np  # simulations run without it

    rows, wanted_sums = np.asarray(matrix, dtype=float), np.asarray(target, dtype=float)
    scale = np.linalg.norm(rows, axis=0)
    scale = np.where(scale > 0, scale, 1)
    rows = rows / scale
    num_columns = rows.shape[1]
    x = np.zeros(num_columns)
    free = np.zeros(num_columns, dtype=bool)
    for _ in range(10 * num_columns):
        gradient = np.where(free, -np.inf, rows.T @ (wanted_sums - rows @ x))
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-10:
            break
        free[best] = True
        while True:
            wanted = np.zeros(num_columns)
            wanted[free] = np.linalg.lstsq(rows[:, free], wanted_sums, rcond=None)[0]
            sinking = free & (wanted <= 0)
            if not sinking.any():
                x = wanted
                break
            # Go towards it until the first value reaches 0; values at 0 are held there.
            step = float(np.min(x[sinking] / (x[sinking] - wanted[sinking])))
            x += step * (wanted - x)
            free &= x > 1e-12
            x[~free] = 0
    return [float(value) for value in x / scale]
