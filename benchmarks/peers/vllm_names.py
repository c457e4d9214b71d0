"""Quire and vLLM: both have the same names, so one adapter serves both."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.peer_engine import MAX_MODEL_LEN, MAX_NUM_SEQS
from benchmarks.peers.workloads import WorkRequest


def open_engine(model: Path, *, library: str, **options: Any) -> "LLMEngine":
    return LLMEngine(model, library, options)


class LLMEngine:
    """The class `LLM` of the named library."""

    def __init__(self, model: Path, library: str, options: dict[str, Any]) -> None:
        self._library: Any = importlib.import_module(library)
        self.version: str = self._library.__version__
        self._llm = self._library.LLM(
            model=str(model),
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            enable_prefix_caching=True,
            **options,
        )

    def generate(self, requests: Sequence[WorkRequest], *, n: int, temperature: float) -> list[int]:
        params = [
            self._library.SamplingParams(
                n=n,
                temperature=temperature,
                max_tokens=request.num_output_tokens,
                min_tokens=request.num_output_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            for request in requests
        ]
        adapters = self._adapters(requests)
        chosen = {} if adapters is None else {"lora_request": adapters}
        outputs = self._llm.generate(_prompts(requests), params, use_tqdm=False, **chosen)
        return [len(sample.token_ids) for output in outputs for sample in output.outputs]

    def _adapters(self, requests: Sequence[WorkRequest]) -> list[Any] | None:
        """One entry for each request, or None where none has an adapter."""
        if all(request.adapter is None for request in requests):
            return None
        home = importlib.import_module(f"{self._library.__name__}.lora.request")
        return [request.adapter and home.LoRARequest(*request.adapter) for request in requests]

    def beam_search(self, requests: Sequence[WorkRequest], *, beam_width: int) -> list[int]:
        home = importlib.import_module(f"{self._library.__name__}.sampling_params")
        length = requests[0].num_output_tokens
        params = home.BeamSearchParams(beam_width=beam_width, max_tokens=length, ignore_eos=True)
        outputs = self._llm.beam_search(_prompts(requests), params)
        return [
            len(beam.tokens) - len(request.prompt_token_ids)
            for request, output in zip(requests, outputs, strict=True)
            for beam in output.sequences
        ]

    def reset(self, upcoming: Sequence[WorkRequest]) -> None:
        self._llm.reset_prefix_cache()

    def close(self) -> None:
        pass  # ends with the process


def _prompts(requests: Sequence[WorkRequest]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": request.prompt_token_ids} for request in requests]
