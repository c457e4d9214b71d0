"""`python -m benchmarks.peers.low_bits DIR`: GPTQ, AWQ and compressed-tensors in Quire, vLLM and OpenVINO, in turns.

DIR is the folder made by `python -m benchmarks.peers.prepare DIR`. A model of it is packed into each format by the
packers of the tests; OpenVINO takes what `optimum-cli` makes of the packed folder. All engines of a format stay loaded,
on one CPU each. What an engine cannot load is printed with its last words.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.peers.engines import ENGINES, EngineRow
from benchmarks.peers.worker import Worker, WorkerEnded
from benchmarks.peers.workloads import TOKEN_IDS, WorkRequest
from benchmarks.rates import print_in_turns, rates_of
from tests.models.stored.packers import (
    Case,
    awq,
    awq_config,
    bytes_by_output,
    compressed,
    gptq,
    gptq_config,
    pack_checkpoint,
    packed,
)

GROUP = 128
_INT = {"type": "int", "symmetric": True}
_DYNAMIC = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
FORMATS = {
    "awq": Case(awq_config(group_size=GROUP, version="gemm"), awq(GROUP, "gemm")),
    "gptq": Case(gptq_config(4, GROUP, desc_act=False, sym=True), gptq(4, GROUP)),
    "w4a16": Case(
        compressed("pack-quantized", {**_INT, "num_bits": 4, "strategy": "group", "group_size": GROUP}),
        packed(4, GROUP),
    ),
    "w8a8": Case(
        compressed("int-quantized", {**_INT, "num_bits": 8, "strategy": "channel"}, input_activations=_DYNAMIC),
        bytes_by_output("weight_scale"),
    ),
}
KEPT = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.low_bits", description=__doc__)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--model", default="M160")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--engines", nargs="+", choices=("quire", "vllm", "openvino"), default=("quire", "vllm"))
    parser.add_argument("--dtype", default="bfloat16", help="of activations (default: %(default)s)")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the packed models, which are kept")
    options = parser.parse_args()
    peers = options.peers.absolute()
    for name in options.formats:
        model = written(peers / "models" / f"{options.model}-bf16", options.scratch / name, FORMATS[name])
        with ExitStack() as stack:
            workers = {}
            for engine in options.engines:
                try:
                    row = row_of(engine, options.dtype, eager=options.eager)
                    folder = exported(model, peers) if engine == "openvino" else model
                    log = options.scratch / f"{name}-{engine}.log"
                    worker = Worker(row, folder, peers, log, cpus=sorted(os.sched_getaffinity(0))[:1])
                    workers[engine] = stack.enter_context(worker)
                except WorkerEnded as error:
                    print(f"{name}, {engine}: does not load: {error}", flush=True)
            measure(name, workers, options.turns)


def row_of(engine: str, dtype: str, *, eager: bool) -> EngineRow:
    row = ENGINES[engine]
    if engine == "openvino":
        return row
    extra = {"num_blocks": 512} if engine == "quire" else {"enforce_eager": eager}
    return replace(row, options=row.options | {"dtype": dtype} | extra)


def written(source: Path, target: Path, case: Case) -> Path:
    """The packed folder, made once."""
    if not target.exists():
        print(f"packing {source} into {target}", file=sys.stderr, flush=True)
        stored = pack_checkpoint(source, target, case)
        shutil.rmtree(target / "floats")
        for name in KEPT:
            shutil.copy(source / name, stored)
    return target / "stored"


def exported(model: Path, peers: Path) -> Path:
    """The folder that OpenVINO reads, made once. Raises `WorkerEnded` where its tool cannot read the format."""
    target = model.with_name("openvino")
    if not target.exists():
        program = peers / "openvino" / "bin" / "optimum-cli"
        command = [program, "export", "openvino", "--task", "text-generation-with-past", "--model", model, target]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            raise WorkerEnded(done.stderr[-1000:])
    return target


def measure(name: str, workers: dict[str, Worker], turns: int) -> None:
    """Print a line for each rate and engine, and the first engine's rate over those of the others."""
    by_engine = {engine: rates_of(_run(worker)) for engine, worker in workers.items()}
    for worker in workers.values():
        worker.run([WorkRequest(list(TOKEN_IDS[:16]), 4)] * 16)
    for what in next(iter(by_engine.values()), ()):
        print_in_turns(f"{name}, {what}", {engine: each[what] for engine, each in by_engine.items()}, turns)


def _run(worker: Worker) -> Callable[[int, int, int], float]:
    draw = random.Random(0)

    def run(num_prompts: int, num_tokens: int, num_outputs: int) -> float:
        prompts = ([draw.choice(TOKEN_IDS) for _ in range(num_tokens)] for _ in range(num_prompts))
        return worker.run([WorkRequest(prompt, num_outputs) for prompt in prompts]).cpu_seconds

    return run


if __name__ == "__main__":
    main()
