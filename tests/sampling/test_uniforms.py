"""The random numbers: pinned values, uniform along every axis, nothing shared between streams."""

import numpy as np
import pytest
from scipy import stats

from quire.sampling.uniforms import stream_keys, uniforms

COUNT = 200_000


def draw(seeds: np.ndarray, indices: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return uniforms(stream_keys(seeds.tolist(), indices.tolist()), positions.astype(np.uint64))


def reference(seed: int, sample_index: int, position: int) -> float:
    """The documented formula in Python's unbounded integers."""
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    key = mix((mix(seed & mask) + (sample_index + 1) * gamma) & mask)
    return (mix((key + (position + 1) * gamma) & mask) >> 11) * 2.0**-53


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63, 2**64 - 1, 1234567890123456789])
def test_the_numbers_are_those_of_the_documented_formula(seed: int) -> None:
    for sample_index in (0, 1, 127):
        for position in (0, 1, 131_071):
            (value,) = uniforms(stream_keys([seed], [sample_index]), np.array([position], dtype=np.uint64))
            assert value == reference(seed, sample_index, position)


def test_the_numbers_never_change() -> None:
    # A released seed must give the same text in the next release.
    values = draw(np.array([0, 42, 42]), np.array([0, 0, 1]), np.array([0, 7, 7]))
    assert values.tolist() == [0.6524484863740322, 0.41874701597568365, 0.5851891363830547]


@pytest.mark.parametrize("axis", ["seed", "sample_index", "position"])
def test_uniform_and_uncorrelated_along(axis: str) -> None:
    zeros, steps = np.zeros(COUNT, dtype=np.int64), np.arange(COUNT)
    values = {
        "seed": lambda: draw(steps, zeros, zeros),
        "sample_index": lambda: draw(zeros, steps, zeros),
        "position": lambda: draw(zeros, zeros, steps),
    }[axis]()
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert stats.chisquare(np.histogram(values, bins=1000, range=(0, 1))[0]).pvalue > 1e-3
    for lag in (1, 2, 3, 64):
        pairs, _, _ = np.histogram2d(values[:-lag], values[lag:], bins=32, range=((0, 1), (0, 1)))
        assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


def test_streams_do_not_overlap() -> None:
    seeds, positions = np.divmod(np.arange(COUNT), 100)
    assert len(np.unique(draw(seeds, np.zeros_like(seeds), positions))) == COUNT
