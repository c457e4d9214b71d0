"""peak_resident: the largest resident memory of an engine process (VmHWM), estimated from its memory plan.

The peak is at one of two moments. While loading, the largest tensor of the checkpoint is in memory besides its packed
copy. While serving, all planned memory has been touched, and freed buffers of earlier steps lie between those of the
current one; by measurement they take about as much again (docs/benchmarks.md). The interpreter with its libraries and
the tokeniser come on top of both. Memory plans do not count them; their sizes here were measured.
"""

from pathlib import Path

from quire.dtypes import DTYPE_BYTES
from quire.engine.memory_plan import MemoryPlan
from quire.model_config import ModelConfig
from quire.models.safetensors_file import RELEASED_BYTES
from quire.simulation.devices import PROCESS_BYTES

TOKENIZER_SHARE = 7
"""Bytes of memory that a tokeniser takes per byte of its tokenizer.json."""


def peak_resident(plan: MemoryPlan, model: ModelConfig, folder: Path, process_bytes: int = 0) -> dict[str, int]:
    """Maximum bytes by purpose, with every block written and log-probabilities requested.

    `folder` is the model's. `process_bytes` is the size of an empty process on a measured device; 0 if unknown.
    """
    process = process_bytes or PROCESS_BYTES
    tokenizer_file = folder / "tokenizer.json"
    tokenizer = TOKENIZER_SHARE * tokenizer_file.stat().st_size if tokenizer_file.is_file() else 0
    parameter = DTYPE_BYTES[model.checkpoint_dtype]
    mapped = min(model.spec.largest_matrix * parameter + RELEASED_BYTES, model.spec.num_matrix_parameters * parameter)
    loading = plan.weights + mapped
    serving = plan.total + plan.activations
    return {
        "process": process,
        "tokenizer": tokenizer,
        "loading": loading,
        "serving": serving,
        "total": process + tokenizer + max(loading, serving),
    }
