"""Texts per second of an embedding model, and what int8 changes: `python -m benchmarks.embeddings MODEL`.

Every cell embeds a batch of texts of equal length, by token ids, so that no padding helps or hurts a peer. Quire in
float32 and int8, transformers and, where they are installed, sentence-transformers and fastembed (onnxruntime) take
turns on the same weights and threads; the best round counts. `--onnx` is the folder of the model's ONNX export. Prints
JSON; the last entry is the cosine between the vectors of int8 and float32 for texts of `docs/`.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quire import LLM

TokenIds = list[list[int]]
Embed = Callable[[TokenIds], Any]
LENGTHS, BATCHES = (16, 64, 128, 256, 512), (1, 8, 64, 256)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--onnx", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    llms = {f"quire {form or 'float32'}": open_quire(arguments, form) for form in (None, "int8")}
    engines: dict[str, Embed] = {name: quire_embed(llm) for name, llm in llms.items()}
    engines |= peers(arguments)
    longest = min(llm.memory_plan.max_model_len for llm in llms.values())
    cells = []
    for length in arguments.lengths:
        for batch in arguments.batches if length <= longest else ():
            texts = np.random.default_rng(length).integers(1000, 20000, (batch, length)).tolist()
            rates = {name: batch / seconds for name, seconds in measure(engines, texts, arguments.rounds).items()}
            cells.append({"tokens": length, "batch": batch, **{name: round(rate, 1) for name, rate in rates.items()}})
            print(json.dumps(cells[-1]), flush=True)
    exact, rounded = llms.values()
    print(json.dumps({"cosine of int8": cosines(exact, rounded)}))


def open_quire(arguments: argparse.Namespace, form: str | None) -> LLM:
    return LLM(arguments.model, threads=arguments.threads, quantization=form)


def quire_embed(llm: LLM) -> Embed:
    return lambda texts: llm.embed(texts, use_tqdm=False)


def measure(engines: dict[str, Embed], texts: TokenIds, rounds: int) -> dict[str, float]:
    """Seconds of the best round of each engine, in turns."""
    best = dict.fromkeys(engines, float("inf"))
    for embed in engines.values():
        embed(texts)
    for _ in range(rounds):
        for name, embed in engines.items():
            started = time.perf_counter()
            embed(texts)
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def peers(arguments: argparse.Namespace) -> dict[str, Embed]:
    """The engines that are installed beside Quire."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(arguments.model).eval()
    found: dict[str, Embed] = {"transformers": lambda texts: run_torch(model, texts)}
    if find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]

        modules = SentenceTransformer(arguments.model, device="cpu")
        found["sentence-transformers"] = lambda texts: run_modules(modules, texts)
    if arguments.onnx is not None and find_spec("onnxruntime"):
        from onnxruntime import InferenceSession, SessionOptions  # type: ignore[import-not-found]

        options = SessionOptions()
        options.intra_op_num_threads = arguments.threads
        session = InferenceSession(str(arguments.onnx / "model.onnx"), options)
        found["onnxruntime"] = lambda texts: run_onnx(session, texts)
    return found


def run_torch(model: Any, texts: TokenIds) -> None:
    """Mean pooling over batches of 32, the default of sentence-transformers."""
    with torch.inference_mode():
        for part in parts(texts):
            ids = torch.tensor(part)
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)


def run_modules(modules: Any, texts: TokenIds) -> None:
    with torch.inference_mode():
        for part in parts(texts):
            ids = torch.tensor(part)
            modules({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def run_onnx(session: Any, texts: TokenIds) -> None:
    names = {entry.name for entry in session.get_inputs()}
    for part in parts(texts):
        ids = np.array(part, dtype=np.int64)
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        session.run(None, {name: array for name, array in given.items() if name in names})[0].mean(1)


def parts(texts: TokenIds) -> list[TokenIds]:
    return [texts[first : first + 32] for first in range(0, len(texts), 32)]


def cosines(exact: LLM, rounded: LLM) -> dict[str, float]:
    """Between the vectors of two engines, for pieces of Quire's documentation."""
    texts = [piece[:700] for path in sorted(Path("docs").glob("*.md")) for piece in path.read_text().split("\n\n")]
    texts = [text for text in texts if len(text) > 40][:200]
    found: Sequence[Any] = [
        [output.outputs.embedding for output in llm.embed(texts, truncate_prompt_tokens=-1, use_tqdm=False)]
        for llm in (exact, rounded)
    ]
    similar = (np.array(found[0]) * np.array(found[1])).sum(1)
    return {"mean": round(float(similar.mean()), 5), "least": round(float(similar.min()), 5)}


if __name__ == "__main__":
    main()
