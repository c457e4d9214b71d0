"""transformers' `generate`: static batches with left padding, each as long as its longest output."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peers.peer_engine import NotOffered
from benchmarks.peers.workloads import WorkRequest

BATCH_SIZE = 16


def open_engine(model: Path) -> "TransformersEngine":
    return TransformersEngine(model)


class TransformersEngine:
    """One model; sixteen requests at a time."""

    def __init__(self, model: Path) -> None:
        self.version: str = transformers.__version__
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate(self, requests: Sequence[WorkRequest], *, n: int, temperature: float) -> list[int]:
        options: dict[str, Any] = {"num_return_sequences": n}
        if temperature > 0:
            options |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return self._batches(requests, n, max(1, BATCH_SIZE // n), options)

    def beam_search(self, requests: Sequence[WorkRequest], *, beam_width: int) -> list[int]:
        raise NotOffered("not run: transformers' beam search takes minutes here")

    def _batches(self, requests: Sequence[WorkRequest], n: int, batch_size: int, options: dict[str, Any]) -> list[int]:
        lengths: list[int] = []
        for first in range(0, len(requests), batch_size):
            batch = requests[first : first + batch_size]
            width = max(len(request.prompt_token_ids) for request in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, request in enumerate(batch):
                ids[row, width - len(request.prompt_token_ids) :] = torch.tensor(request.prompt_token_ids)
                mask[row, width - len(request.prompt_token_ids) :] = 1
            longest = max(request.num_output_tokens for request in batch)
            with torch.inference_mode():
                output = self._model.generate(
                    ids,
                    attention_mask=mask,
                    min_new_tokens=longest,
                    max_new_tokens=longest,
                    pad_token_id=0,
                    eos_token_id=None,
                    **({"do_sample": False} | options),
                )
            if output.shape[1] - width < longest:
                raise RuntimeError(f"transformers returned {output.shape[1] - width} tokens instead of {longest}")
            lengths += [request.num_output_tokens for request in batch for _ in range(n)]  # cut the rest off
        return lengths

    def reset(self, upcoming: Sequence[WorkRequest]) -> None:
        pass  # it keeps no cache

    def close(self) -> None:
        pass
