"""The random numbers of sampling: a pure function of (seed, sample index, position).

There is no state to advance or store. So a sequence gets the same numbers whatever else is in its batch, and continues
with them after a preemption, a fork or a restart. Each (seed, sample index) keys a SplitMix64 stream (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), and the position is the counter:

    mix(z):  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;  z = (z ^ z >> 27) * 0x94D049BB133111EB;  z ^ z >> 31
    key      = mix(mix(seed) + (sample_index + 1) * GAMMA)
    uniform  = (mix(key + (position + 1) * GAMMA) >> 11) * 2**-53                                 all modulo 2**64
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""2**64 divided by the golden ratio, made odd."""


def stream_keys(seeds: Sequence[int], sample_indices: Sequence[int]) -> NDArray[np.uint64]:
    """One key per sequence. A negative seed stands for its two's complement."""
    seed = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF for seed in seeds], dtype=np.uint64)
    return _mix(_mix(seed) + (np.array(sample_indices, dtype=np.uint64) + np.uint64(1)) * GAMMA)


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """A number in [0, 1) per key, at the given position of its stream."""
    bits = _mix(keys + (positions + np.uint64(1)) * GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
