"""The engines that are compared, one row each: interpreter, adapter, weights and options.

Standard library only: every engine's own interpreter reads this table.
"""

import os
import sys
from collections.abc import Collection
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRow:
    """One engine: a column of the result."""

    adapter: str
    """Module of this package whose `open_engine(model, **options)` makes a `PeerEngine`."""
    folder: str | None
    """The peer's environment, with its interpreter in `bin/python`; None: Quire's own interpreter."""
    weights: str
    """Suffix of the model's folder or file below `models/`."""
    options: dict[str, Any] = field(default_factory=dict)


def _quire(weights: str = "fp32", **options: Any) -> EngineRow:
    options = {"library": "quire", "dtype": "float32"} | options
    return EngineRow(adapter="vllm_names", folder=None, weights=weights, options=options)


def _vllm(weights: str = "fp32", dtype: str = "float32", *, enforce_eager: bool = False) -> EngineRow:
    options = {"library": "vllm", "dtype": dtype, "enforce_eager": enforce_eager, "disable_log_stats": True}
    return EngineRow(adapter="vllm_names", folder="vllm", weights=weights, options=options)


def _llama_cpp(weights: str) -> EngineRow:
    return EngineRow(adapter="llama_cpp_server", folder="llama.cpp", weights=f"{weights}.gguf")


ENGINES = {
    "quire": _quire(),
    "quire-bf16": _quire("bf16", dtype="bfloat16"),
    "quire-int8": _quire(quantization="int8"),
    "quire-int4": _quire(quantization="int4"),
    "vllm": _vllm(),
    "vllm-eager": _vllm(enforce_eager=True),
    "vllm-bf16": _vllm("bf16", "bfloat16"),
    "openvino": EngineRow(adapter="openvino_pipeline", folder="openvino", weights="openvino-fp32"),
    "openvino-int8": EngineRow(adapter="openvino_pipeline", folder="openvino", weights="openvino-int8"),
    "llama.cpp-f32": _llama_cpp("f32"),
    "llama.cpp-f16": _llama_cpp("f16"),
    "llama.cpp-q8_0": _llama_cpp("q8_0"),
    "llama.cpp-q4_0": _llama_cpp("q4_0"),
    "transformers": EngineRow(adapter="transformers_batches", folder=None, weights="fp32"),
}


def interpreter(row: EngineRow, peers: Path) -> Path:
    """Where the engine runs. The folder may hold links, so the path is not resolved."""
    return Path(sys.executable) if row.folder is None else peers / row.folder / "bin" / "python"


def model_path(row: EngineRow, peers: Path, model: str) -> Path:
    return peers / "models" / f"{model}-{row.weights}"


def environment(row: EngineRow, peers: Path, cpus: Collection[int]) -> dict[str, str]:
    """The environment of an engine's process, which runs on `cpus`."""
    found = os.environ | {"HF_HUB_OFFLINE": "1"}
    return found | vllm_environment(interpreter(row, peers), cpus) if row.folder == "vllm" else found


def vllm_environment(python: Path, cpus: Collection[int]) -> dict[str, str]:
    """What vLLM's CPU guide recommends: bound threads, a KV space, tcmalloc and Intel's OpenMP preloaded."""
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    preload = [find_library("tcmalloc_minimal"), str(openmp) if openmp.exists() else None]
    return {
        "LD_PRELOAD": ":".join(filter(None, preload)),
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "4"),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(cpus))),
        "VLLM_NO_USAGE_STATS": "1",
    }
