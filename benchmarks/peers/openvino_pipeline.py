"""OpenVINO GenAI's continuous batching. Matrix products of fp32 exports stay in fp32. The KV cache has the plugin's
default, 16 bit for fp32 and 8 bit for int8 exports.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.peer_engine import MAX_NUM_SEQS
from benchmarks.peers.workloads import WorkRequest

CACHE_GIGABYTES = 4
STEP_TOKENS = 256
"""Tokens per step: its default."""


def open_engine(model: Path) -> "OpenVINOEngine":
    return OpenVINOEngine(model)


class OpenVINOEngine:
    """One pipeline, made again whenever its prefix cache must be empty: no call clears it."""

    def __init__(self, model: Path) -> None:
        self.version: str = openvino_genai.get_version()
        self._model = model
        self._pipeline: Any = self._open()

    def _open(self) -> Any:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIGABYTES
        scheduler.max_num_batched_tokens = STEP_TOKENS
        scheduler.max_num_seqs = MAX_NUM_SEQS
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties = {
            "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
            "INFERENCE_PRECISION_HINT": "f32",
        }
        return openvino_genai.ContinuousBatchingPipeline(str(self._model), scheduler, "CPU", properties)

    def generate(self, requests: Sequence[WorkRequest], *, n: int, temperature: float) -> list[int]:
        configs = [_config(request) for request in requests]
        for config in configs:
            if temperature > 0:
                config.do_sample, config.temperature = True, temperature
            config.num_return_sequences = n
        return self._run(requests, configs)

    def beam_search(self, requests: Sequence[WorkRequest], *, beam_width: int) -> list[int]:
        configs = [_config(request) for request in requests]
        for config in configs:
            config.num_beams = config.num_return_sequences = beam_width
        return self._run(requests, configs)

    def _run(self, requests: Sequence[WorkRequest], configs: list[Any]) -> list[int]:
        prompts = [openvino.Tensor(np.array([request.prompt_token_ids], dtype=np.int64)) for request in requests]
        outputs = self._pipeline.generate(prompts, configs)
        return [len(sample) for output in outputs for sample in output.m_generation_ids]

    def reset(self, upcoming: Sequence[WorkRequest]) -> None:
        del self._pipeline  # free its memory before the next is made
        self._pipeline = self._open()
        self.generate([WorkRequest([7] * 64, 16)] * 8, n=1, temperature=0.0)

    def close(self) -> None:
        pass  # it ends with the process


def _config(request: WorkRequest) -> Any:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = request.num_output_tokens
    config.ignore_eos = True
    return config
