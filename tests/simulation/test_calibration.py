"""fit_device: what a known device would take is fitted back to that device."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.optimize import nnls

from quire.errors import ConfigError, QuireError
from quire.simulation.calibration import TimedStep, fit_device, non_negative_least_squares
from quire.simulation.devices import Device, find_device
from quire.simulation.model_shapes import ModelShape
from quire.simulation.step_time import StepTime
from tests.simulation.traces import SLOW, TINY, TINY_CONFIG

KNOWN = Device(
    name="known",
    memory=2**30,
    bandwidth=2e10,
    matrix_rate=1e11,
    step_overhead=3e-4,
    layer_overhead=2e-5,
    sequence_overhead=1e-5,
    element_time=1e-9,
    logit_time=2e-9,
    products={
        "float32": [(1, 2e-10), (4, 2.5e-10), (64, 8e-10), (512, 6e-9)],
        "int8": [(1, 5e-11), (4, 6e-11), (64, 2e-10), (512, 1.5e-9)],
    },
)
SHAPES = (
    ModelShape.of(TINY_CONFIG, "tiny"),
    ModelShape.of(replace(TINY_CONFIG, num_layers=9, vocab_size=900), "deep"),
    ModelShape.of(replace(TINY_CONFIG, hidden_size=96, intermediate_size=200, vocab_size=100), "wide"),
)


def timed(model: ModelShape, count: int, tokens: int, context: int) -> TimedStep:
    pairs = count * (tokens * context + tokens * (tokens + 1) / 2)
    seconds = StepTime(model, KNOWN).seconds(count, count * tokens, count * (context + tokens), pairs, count)
    return TimedStep(model, count, tokens, context, seconds)


def steps() -> list[TimedStep]:
    made = []
    for shape in SHAPES:
        for model in (shape, replace(shape, quantization="int8")):
            made += [timed(model, count, 1, context) for count in (1, 4, 64) for context in (1000, 30000)]
            # Prompts long enough that attention is computed longer than it is read.
            made += [timed(model, 1, 512, 0), timed(model, 1, 64, 0), timed(model, 4, 16, 0)]
    return made


def test_a_known_device_is_found_again() -> None:
    found = fit_device(steps(), name="found", memory=1, process_memory=2)
    for step in steps():
        pairs = step.num_sequences * (
            step.tokens_per_sequence * step.context + step.tokens_per_sequence * (step.tokens_per_sequence + 1) / 2
        )
        context = step.num_sequences * (step.context + step.tokens_per_sequence)
        expected = StepTime(step.model, found).seconds(
            step.num_sequences, step.num_tokens, context, pairs, step.num_sequences
        )
        assert expected == pytest.approx(step.seconds, rel=0.02)
    assert found.bandwidth == pytest.approx(KNOWN.bandwidth, rel=0.05)
    assert (found.name, found.memory, found.process_memory) == ("found", 1, 2)


def test_a_file_brings_the_same_device_back(tmp_path: Any) -> None:
    path = tmp_path / "known.json"
    path.write_text(KNOWN.to_json())
    again = find_device(str(path))
    assert again.to_json() == KNOWN.to_json()
    assert StepTime(SHAPES[0], again).seconds(3, 40, 90, 900, 3) == StepTime(SHAPES[0], KNOWN).seconds(
        3, 40, 90, 900, 3
    )


def test_between_and_beyond_the_measured_rows_times_are_linear() -> None:
    def matrix(rows: int) -> float:
        bare = Device(name="bare", memory=1, bandwidth=1e30, matrix_rate=1e30, products=KNOWN.products)
        return StepTime(SHAPES[0], bare).seconds(0, rows, 0, 0, 0) / SHAPES[0].spec.layer_parameters

    assert matrix(0) == 0
    assert matrix(1) == pytest.approx(2e-10)
    assert matrix(34) == pytest.approx((2.5e-10 + 8e-10) / 2)
    assert matrix(960) == pytest.approx(2 * 6e-9 - 8e-10)


def test_what_was_not_measured_is_not_guessed() -> None:
    with pytest.raises(ConfigError, match="device known was not measured with weights in bfloat16, only with float32"):
        StepTime(replace(TINY, dtype="bfloat16"), KNOWN)
    with pytest.raises(QuireError, match="let nothing else run"):
        fit_device([timed(SHAPES[0], 1, 1, 10)], name="x", memory=1, process_memory=0)


@pytest.mark.parametrize("curve", [[(1, 1e-9)], [(1, 1e-9), (1, 2e-9)], [(1, 2e-9), (2, 1e-9)], [(1, -1.0), (2, 1.0)]])
def test_a_curve_that_cannot_be_is_refused(curve: list[tuple[float, float]]) -> None:
    with pytest.raises(ConfigError, match="products of float32 is"):
        replace(SLOW, products={"float32": curve})


MATRICES = npst.arrays(np.float64, (9, 5), elements=st.integers(-9, 9).map(float))


@settings(max_examples=100, deadline=None)
@given(MATRICES, npst.arrays(np.float64, 9, elements=st.integers(-9, 9).map(float)))
def test_least_squares_are_scipy_s(matrix: Any, target: Any) -> None:
    x = np.array(non_negative_least_squares(matrix, target))
    assert (x >= 0).all()
    assert np.linalg.norm(matrix @ x - target) == pytest.approx(nnls(matrix, target)[1], abs=1e-6)


def test_a_busy_machine_is_fitted_too() -> None:
    """Steps that take as long whatever they read or attend to: the rates of attention are then those of products."""
    levelled = [
        replace(step, seconds=max(other.seconds for other in steps() if other.num_tokens == step.num_tokens))
        for step in steps()
    ]
    found = fit_device(levelled, name="busy", memory=1, process_memory=2)
    assert all(seconds > 0 for curve in found.products.values() for _, seconds in curve)
    for step in levelled:
        expected = StepTime(step.model, found).seconds(
            step.num_sequences, step.num_tokens, step.num_sequences * (step.context + 1), 1.0, step.num_sequences
        )
        assert 0 < expected < float("inf")


@pytest.mark.parametrize("seed", range(8))
def test_disturbed_steps_are_fitted(seed: int) -> None:
    """Every step takes up to five times as long, at random."""
    draw = random.Random(seed)
    found = fit_device(
        [replace(step, seconds=step.seconds * draw.uniform(1, 5)) for step in steps()],
        name="disturbed",
        memory=1,
        process_memory=2,
    )
    assert found.bandwidth > 0
    assert found.matrix_rate > 0
