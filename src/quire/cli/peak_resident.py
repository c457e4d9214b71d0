"""peak_resident: most that the system will show of an engine's process (VmHWM), from its memory plan.

Two moments can be the peak: loading, when the largest tensor of the checkpoint is in memory beside what it is packed
into, and serving, when all that was planned has been touched, and buffers of steps past lie free between those of the
present one. Beside both are the interpreter with its libraries and the tokeniser, which no memory plan counts: their
sizes here were measured, and so was that the free buffers are about as large as the others (docs/benchmarks.md).
"""

from pathlib import Path

from quire.dtypes import DTYPE_BYTES
from quire.engine.memory_plan import MemoryPlan
from quire.model_config import ModelConfig
from quire.models.safetensors_file import RELEASED_BYTES

PROCESS_BYTES = 250 * 2**20
"""Interpreter, torch without CUDA and the other libraries, where no measured device says."""
TOKENIZER_SHARE = 7
"""Bytes that a tokeniser takes, by those of its tokenizer.json."""


def peak_resident(plan: MemoryPlan, model: ModelConfig, folder: Path, process_bytes: int = 0) -> dict[str, int]:
    """Bytes at most, by what takes them, with every block written and log-probabilities asked for.

    `folder` is the model's; `process_bytes` what a process took on a measured device before it held anything.
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
