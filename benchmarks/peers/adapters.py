"""`python -m benchmarks.peers.adapters DIR`: LoRA in Quire and vLLM, with the same adapters and requests, in turns.

Both engines stay loaded, on one CPU each, with room for the hot adapters. 64 requests at once: without adapters, with
one adapter, with a hot adapter each, and nine of ten with a hot one and the others with any of those registered, which
are read from disk. Figures are output tokens per CPU second. DIR is the folder made by `python -m
benchmarks.peers.prepare DIR`; adapters have rank 16 and change every dense layer (5 MB each with M160).
"""

import argparse
import os
import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.lora import write_adapter
from benchmarks.peers.engines import ENGINES, model_path
from benchmarks.peers.worker import Worker
from benchmarks.peers.workloads import TOKEN_IDS, WorkRequest
from benchmarks.rates import Rate, print_in_turns
from quire.model_config import ModelConfig

Adapter = tuple[str, int, str]
NUM_REQUESTS = 64
PROMPT_TOKENS = 8
HOT_SHARE = 0.9
ROOM = {"quire": {"num_blocks": 1024}, "vllm": {}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.adapters", description=__doc__)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--model", default="M160")
    parser.add_argument("--engines", default="quire,vllm")
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--hot", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16, help="output tokens of a request (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder for the adapters, by default a temporary one")
    options = parser.parse_args()
    peers, names = options.peers.absolute(), options.engines.split(",")
    config = ModelConfig.from_folder(model_path(ENGINES["quire"], peers, options.model))
    lora = {"enable_lora": True, "max_loras": options.hot, "max_lora_rank": 16}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.scratch)))
        adapters = [_written(folder / f"a{number}", config, number) for number in range(options.registered)]
        workers = {}
        for name in names:
            row = ENGINES[name]
            row = replace(row, options=row.options | lora | ROOM.get(name, {}))
            model = model_path(row, peers, options.model)
            worker = Worker(row, model, peers, folder / f"{name}.log", cpus=sorted(os.sched_getaffinity(0))[:1])
            workers[name] = stack.enter_context(worker)
        measure(workers, cases(adapters, options.hot), options.tokens, options.turns)


def _written(folder: Path, config: ModelConfig, number: int) -> Adapter:
    request = write_adapter(folder, config, number)
    return request.lora_name, request.lora_int_id, request.lora_path


def cases(adapters: list[Adapter], num_hot: int) -> dict[str, Callable[[], list[Adapter | None]]]:
    """Name → the adapters of the next requests."""
    draw = random.Random(0)

    def mixed() -> list[Adapter | None]:
        ends = [num_hot if draw.random() < HOT_SHARE else len(adapters) for _ in range(NUM_REQUESTS)]
        return [adapters[draw.randrange(end)] for end in ends]

    return {
        "no adapter": lambda: [None] * NUM_REQUESTS,
        "one adapter": lambda: [adapters[0]] * NUM_REQUESTS,
        f"{num_hot} hot adapters": lambda: [adapters[number % num_hot] for number in range(NUM_REQUESTS)],
        f"{len(adapters)} registered, {num_hot} hot": mixed,
    }


def measure(
    workers: dict[str, Worker], kinds: dict[str, Callable[[], list[Adapter | None]]], num_tokens: int, turns: int
) -> None:
    """Print a line for each engine and case, and the first engine's rate over those of the others."""
    draw = random.Random(1)

    def requests(adapters: list[Adapter | None]) -> list[WorkRequest]:
        prompts = ([draw.choice(TOKEN_IDS) for _ in range(PROMPT_TOKENS)] for _ in adapters)
        return [WorkRequest(prompt, num_tokens, adapter) for prompt, adapter in zip(prompts, adapters, strict=True)]

    for worker in workers.values():  # loads the hot adapters
        worker.run([replace(each, num_output_tokens=2) for each in requests(list(kinds.values())[2]())])
    for kind, choose in kinds.items():
        chosen = [requests(choose()) for _ in range(turns)]
        print_in_turns(kind, {name: _rate(worker, chosen) for name, worker in workers.items()}, turns)


def _rate(worker: Worker, turns: list[list[WorkRequest]]) -> Rate:
    """Tokens per CPU second of the next turn's requests."""
    waiting = iter(turns)

    def measure() -> float:
        requests = next(waiting)
        return sum(each.num_output_tokens for each in requests) / worker.run(requests).cpu_seconds

    return measure


if __name__ == "__main__":
    main()
