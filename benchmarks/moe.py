"""A layer of experts against a dense MLP of as many active parameters: `python -m benchmarks.moe`.

Weights are random. The grouped kernel, a loop over the experts and the dense MLP take turns, and each figure is the
best of several, since other programs only make a turn slower; with one thread it is processor time, which leaves out
what other programs take. For one token the table also says which share of the read bandwidth the active weights take;
the bandwidth is measured in the same run.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ceilings import READ_BYTES
from quire.kernels import cpu
from quire.kernels.expert_products import ExpertLoop
from quire.kernels.interface import ExpertWeight, Mxfp4Matrix, PackedExperts
from quire.layers.linear import Linear, LinearWeight, stored_as
from quire.quantization import METHODS


class Shape(NamedTuple):
    """One layer of a model, with fewer experts where all would not fit a small machine."""

    hidden: int
    inner: int
    num_experts: int
    num_active: int


SHAPES = {
    "qwen1.5-moe": Shape(2048, 1408, 16, 4),
    "mixtral": Shape(1024, 3584, 8, 2),
    "gpt-oss": Shape(2880, 2880, 12, 4),
}
FORMATS = ("float32", "bfloat16", "int8", "int4", "mxfp4", "mxfp4 of int8")
NUM_TOKENS = (1, 16, 64, 2048)
NUM_STEPS = 8
"""Steps of one token in a turn, each with other experts, so that no cache holds them."""

Step = tuple[Tensor, Tensor, Tensor]
"""x [T, H], chosen experts and weights [T, A]."""


def make_experts(shape: Shape, form: str) -> PackedExperts:
    def matrix(rows: int, columns: int) -> Tensor | Mxfp4Matrix:
        if not form.startswith("mxfp4"):
            return torch.randn(rows, columns).mul_(0.02)
        blocks = torch.randint(0, 256, (rows, columns // 32, 16), dtype=torch.uint8)
        return Mxfp4Matrix(blocks, torch.randint(118, 122, (rows, columns // 32), dtype=torch.uint8))

    def pack(rows: int, columns: int) -> ExpertWeight:
        stored = stored_as({"mxfp4": "float32", "mxfp4 of int8": "int8"}.get(form, form))
        matrices: Any = [[matrix(rows, columns)] for _ in range(shape.num_experts)]
        return cpu.pack_experts(matrices, stored)

    gate_up, down = pack(2 * shape.inner, shape.hidden), pack(shape.hidden, shape.inner)
    return PackedExperts(gate_up, down, None, None, shape.num_experts, shape.inner, "silu")


def make_dense(shape: Shape, form: str) -> Callable[[Tensor], Tensor]:
    """An MLP of as many parameters as a token's experts have. There is no dense MXFP4: int4 stands beside it."""
    inner, dtype = shape.num_active * shape.inner, "int4" if form.startswith("mxfp4") else form
    gate_up, down = (
        Linear(cpu, [LinearWeight(torch.randn(rows, columns).mul_(0.02))], dtype)
        for rows, columns in ((2 * inner, shape.hidden), (shape.hidden, inner))
    )
    return lambda x: down.after_gate(gate_up(x), "silu")


def make_steps(shape: Shape, num_tokens: int) -> list[Step]:
    def step() -> Step:
        chosen = torch.rand(num_tokens, shape.num_experts).argsort(1)[:, : shape.num_active]
        weights = torch.full((num_tokens, shape.num_active), 1 / shape.num_active)
        return torch.randn(num_tokens, shape.hidden), chosen.int().contiguous(), weights

    return [step() for _ in range(NUM_STEPS if num_tokens == 1 else 1)]


def best_of_turns(runs: Sequence[Callable[[Step], object]], steps: Sequence[Step], seconds: float) -> list[float]:
    """For each of `runs`, the least seconds a step of a turn took."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(runs)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best[-1] == float("inf"):
        for index, run in enumerate(runs):
            started = clock()
            for step in steps:
                run(step)
            best[index] = min(best[index], (clock() - started) / len(steps))
    return best


def compare(shape: Shape, form: str, seconds: float) -> dict[int, tuple[float, float, float]]:
    """By number of tokens: seconds of the kernel, of the loop (NaN for MXFP4), and of the dense MLP."""
    packed, dense = make_experts(shape, form), make_dense(shape, form)
    loop = ExpertLoop(cpu.linear, cpu.linear_quantized)

    def grouped(step: Step) -> None:
        cpu.experts(*step, packed, torch.zeros_like(step[0]))

    def one_by_one(step: Step) -> None:
        loop(*step, packed, torch.zeros_like(step[0]))

    found = {}
    for num_tokens in NUM_TOKENS:
        runs: list[Callable[[Step], object]] = [grouped, lambda step: dense(step[0])]
        if not form.startswith("mxfp4"):
            runs.append(one_by_one)
        kernel, of_dense, *of_loop = best_of_turns(runs, make_steps(shape, num_tokens), seconds)
        found[num_tokens] = (kernel, of_loop[0] if of_loop else float("nan"), of_dense)
    return found


def active_bytes(shape: Shape, form: str) -> float:
    """Bytes of the weights that one token reads."""
    parameters = 3 * shape.hidden * shape.inner * shape.num_active
    if form.startswith("mxfp4"):
        return parameters * 4.25 / 8
    if form in METHODS:
        layers = METHODS[form].layers
        rows = ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner))
        return shape.num_active * sum(layers.weight_bytes(*each) for each in rows)
    return float(parameters * getattr(torch, form).itemsize)


def read_bandwidth() -> float:
    """GB/s, as the best of turns too."""
    memory = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    any_step = make_steps(SHAPES["mixtral"], 1)[:1]
    return READ_BYTES / best_of_turns([lambda step: memory.sum()], any_step, 2.0)[0] / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--seconds", type=float, default=2.0, help="of every comparison")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bandwidth = read_bandwidth()
    print(f"{cpu.isa()}, {arguments.threads} threads, read {bandwidth:.1f} GB/s; milliseconds (times loop, dense)")
    print(f"{'shape':12}{'format':15}{'of read':>8}" + "".join(f"{f'{count} tokens':>26}" for count in NUM_TOKENS))
    for name in arguments.shapes:
        for form in arguments.formats:
            found = compare(SHAPES[name], form, arguments.seconds)
            share = active_bytes(SHAPES[name], form) / found[1][0] / 1e9 / bandwidth
            cells = (f"{t * 1e3:.2f} ({loop / t:.2f}, {dense / t:.2f})" for t, loop, dense in found.values())
            print(f"{name:12}{form:15}{share:8.0%}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
