"""Small traces for the tests of this folder, made here."""

import random

from quire.model_config import ModelConfig, RopeConfig
from quire.simulation.devices import Device
from quire.simulation.model_shapes import ModelShape
from quire.simulation.trace import Trace, TraceRow

TINY_CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=256,
    max_position_embeddings=256,
    rope=RopeConfig(),
)
TINY = ModelShape.of(TINY_CONFIG, "tiny", dtype="float16")
SLOW = Device(name="slow", memory=2**30, bandwidth=1e9, matrix_rate=1e11, step_overhead=0.001, sequence_overhead=1e-5)


def lengths(num_rows: int, seed: int = 0, *, most: int = 120, arrivals: bool = False) -> Trace:
    """Random lengths, and a request every 10 ms if asked."""
    draw = random.Random(seed)
    rows = [
        TraceRow(draw.randint(1, most), draw.randint(1, most), 0.01 * index if arrivals else None)
        for index in range(num_rows)
    ]
    return Trace("made", rows)
