"""Texts per second of an embedding model, and what int8 changes: `python -m benchmarks.embeddings MODEL`.

Every cell embeds a batch of texts of equal length, by token ids, so that no padding helps or hurts a peer. Quire in
float32 and int8 and its peers take turns on the same weights and threads. `--python` is an interpreter with the peers
(torch, transformers, sentence-transformers, onnxruntime, onnx, fastembed), `--vllm` one with vLLM; each peer runs in a
process of its own. A cell has the
texts per CPU second of the median round, since other work on the machine changes seconds more than CPU seconds, and
for each peer the median of its CPU seconds by those of Quire in float32 in the same round. Prints JSON; the last entry
is the cosine between the vectors of int8 and float32 for texts of `docs/`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.peers.engines import vllm_environment
from quire import LLM

TokenIds = list[list[int]]
Embed = Callable[[TokenIds, int], tuple[float, Sequence[float]]]
"""Texts, and how often they are embedded -> CPU seconds of all times, and the first text's vector."""
LENGTHS, BATCHES = (16, 64, 128, 256, 512), (1, 8, 64, 256)
PEERS = ("transformers", "sentence-transformers", "onnxruntime", "fastembed", "vllm")
QUIRE = "quire float32"
TURN_TOKENS = 1024
"""Tokens of a turn: a smaller batch is repeated, since what other work leaves in the caches would decide."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--most", type=int, default=2**17, help="tokens of the largest cell")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--vllm", default=None)
    parser.add_argument("--peers", nargs="*", default=PEERS[:-1], choices=PEERS)
    arguments = parser.parse_args()
    llms = {f"quire {form or 'float32'}": open_quire(arguments, form) for form in (None, "int8")}
    engines: dict[str, Embed] = {name: partial(run_quire, llm) for name, llm in llms.items()}
    engines |= {name: start_peer(name, arguments) for name in arguments.peers}
    longest = min(llm.memory_plan.max_model_len for llm in llms.values())
    for length in arguments.lengths:
        for batch in arguments.batches:
            if length <= longest and length * batch <= arguments.most:
                texts = np.random.default_rng(length).integers(1000, 20000, (batch, length)).tolist()
                print(json.dumps(cell(engines, texts, arguments.rounds)), flush=True)
    exact, rounded = llms.values()
    print(json.dumps({"cosine of int8": cosines(exact, rounded), "load average": os.getloadavg()}))


def open_quire(arguments: argparse.Namespace, form: str | None) -> LLM:
    return LLM(str(arguments.model), threads=arguments.threads, quantization=form)


def run_quire(llm: LLM, texts: TokenIds, repeats: int) -> tuple[float, Sequence[float]]:
    started = time.process_time()
    for _ in range(repeats):
        outputs = llm.embed(texts, use_tqdm=False)
    return time.process_time() - started, outputs[0].outputs.embedding


def start_peer(name: str, arguments: argparse.Namespace) -> Embed:
    """Start a peer's process and wait until it is ready."""
    script = Path(__file__).with_name("embedding_peers.py")
    python, environment = arguments.python, dict(os.environ)
    if name == "vllm":
        python = arguments.vllm or arguments.python
        environment |= vllm_environment(Path(python), sorted(os.sched_getaffinity(0))[: arguments.threads])
    command = [python, str(script), name, str(arguments.model), str(arguments.threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    asks, answers = process.stdin, process.stdout

    def answer() -> Any:
        line = answers.readline()
        if not line:
            sys.exit(f"{name} ended; its messages are above")
        return json.loads(line)

    def embed(texts: TokenIds, repeats: int) -> tuple[float, Sequence[float]]:
        asks.write(json.dumps([texts, repeats]) + "\n")
        asks.flush()
        _, cpu_seconds, vector = answer()
        return cpu_seconds, vector

    answer()
    return embed


def cell(engines: dict[str, Embed], texts: TokenIds, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    repeats = max(1, TURN_TOKENS // (len(texts) * len(texts[0])))
    vectors = {name: embed(texts, 1)[1] for name, embed in engines.items()}
    for name, vector in vectors.items():
        similar = float(np.dot(vector, vectors[QUIRE]))
        assert similar > (0.99 if "int8" in name else 0.9999), f"{name} computes another vector: cosine {similar}"
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, embed in engines.items():
            seconds[name].append(embed(texts, repeats)[0] / repeats)
    own = seconds[QUIRE]
    ratios = {
        name: round(median(other / mine for other, mine in zip(times, own, strict=True)), 2)
        for name, times in seconds.items()
        if name != QUIRE
    }
    rates = {name: round(len(texts) / median(times), 1) for name, times in seconds.items()}
    return {"tokens": len(texts[0]), "batch": len(texts), "texts per CPU second": rates, "times of float32": ratios}


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
