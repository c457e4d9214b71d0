"""A layer of experts against a dense MLP of as many active parameters: `python -m benchmarks.moe`.

Weights are random. The grouped kernel, a loop over the experts and the dense MLP take turns, and each figure is the
best of several, since other programs only make a turn slower; with one thread it is processor time, which leaves out
what other programs take. For one token the table also says which share of the read bandwidth the active weights take;
the bandwidth is measured in the same run.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.ceilings import READ_BYTES
from quire.gguf.block_types import BLOCK_TYPES_BY_NAME
from quire.kernels import cpu
from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.coded import CodedMatrix
from quire.kernels.expert_products import ExpertLoop
from quire.kernels.interface import ExpertMatrix, ExpertWeight, Mxfp4Matrix, PackedExperts
from quire.layers.linear import Linear, LinearWeight, stored_as
from quire.models.packed_weights import PackedWeights
from quire.quantization import METHODS
from quire.quantization.levels import integers


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
BLOCKS = ("Q8_0", "Q4_0", "Q4_K", "Q6_K")
FORMATS = ("float32", "bfloat16", "int8", "int4", "codes", "mxfp4", "mxfp4 of int8", *BLOCKS)
"""`codes`: 4 bits in groups of 128 with zero points, as GPTQ and AWQ store them."""
FLOATS_AND_METHODS = ("float32", "bfloat16", *METHODS)
GROUP = 128
NUM_TOKENS = (1, 16, 64, 2048)
NUM_STEPS = 8
"""Steps of one token in a turn, each with other experts, so that no cache holds them."""

Step = tuple[Tensor, Tensor, Tensor]
"""x [T, H], chosen experts and weights [T, A]."""


def make_experts(shape: Shape, form: str) -> PackedExperts:
    def matrix(rows: int, columns: int) -> ExpertMatrix:
        if form in BLOCKS:
            return random_blocks(form, rows, columns)
        if form == "codes":
            codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
            scales = torch.full((rows, columns // GROUP), 0.005, dtype=torch.float16)
            return CodedMatrix(codes, scales, GROUP, integers(4), zeros=torch.full_like(scales, 8.0))
        if not form.startswith("mxfp4"):
            return torch.randn(rows, columns).mul_(0.02)
        blocks = torch.randint(0, 256, (rows, columns // 32, 16), dtype=torch.uint8)
        return Mxfp4Matrix(blocks, torch.randint(118, 122, (rows, columns // 32), dtype=torch.uint8))

    def pack(rows: int, columns: int) -> ExpertWeight:
        stored = stored_as({"mxfp4 of int8": "int8"}.get(form, form if form in FLOATS_AND_METHODS else "float32"))
        matrices = [[matrix(rows, columns)] for _ in range(shape.num_experts)]
        return PackedWeights(None).pack_experts(matrices, stored)

    gate_up, down = pack(2 * shape.inner, shape.hidden), pack(shape.hidden, shape.inner)
    return PackedExperts(gate_up, down, None, None, shape.num_experts, shape.inner, "silu")


def make_dense(shape: Shape, form: str) -> Callable[[Tensor], Tensor]:
    """An MLP of as many parameters as a token's experts have. Beside MXFP4 and codes stands int4."""
    inner, dtype = shape.num_active * shape.inner, form if form in FLOATS_AND_METHODS else "int4"
    gate_up, down = (
        Linear(
            cpu,
            [LinearWeight(random_blocks(form, *size) if form in BLOCKS else torch.randn(*size).mul_(0.02))],
            "float32" if form in BLOCKS else dtype,
            PackedWeights(None),
        )
        for size in ((2 * inner, shape.hidden), (shape.hidden, inner))
    )
    return lambda x: down.after_gate(gate_up(x), "silu")


def random_blocks(type_name: str, rows: int, columns: int) -> BlockMatrix:
    """Random codes; scales are small and finite. As llama.cpp does, a width that is no multiple of 256 takes Q8_0."""
    if columns % BLOCK_TYPES_BY_NAME[type_name].num_values:
        type_name = "Q8_0"
    block = BLOCK_TYPES_BY_NAME[type_name]
    return BlockMatrix(torch.randint(0, 40, (rows, columns // block.num_values * block.num_bytes)).byte(), type_name)


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


def compare(packed: PackedExperts, shape: Shape, form: str, seconds: float) -> dict[int, tuple[float, float, float]]:
    """By number of tokens: seconds of the kernel, of the loop (NaN for stored bits), and of the dense MLP."""
    dense = make_dense(shape, form)
    loop = ExpertLoop(cpu.linear, cpu.linear_quantized, cpu.linear_coded)

    def grouped(step: Step) -> None:
        cpu.experts(*step, packed, torch.zeros_like(step[0]))

    def one_by_one(step: Step) -> None:
        loop(*step, packed, torch.zeros_like(step[0]))

    found = {}
    for num_tokens in NUM_TOKENS:
        runs: list[Callable[[Step], object]] = [grouped, lambda step: dense(step[0])]
        if form in FLOATS_AND_METHODS:
            runs.append(one_by_one)
        kernel, of_dense, *of_loop = best_of_turns(runs, make_steps(shape, num_tokens), seconds)
        found[num_tokens] = (kernel, of_loop[0] if of_loop else float("nan"), of_dense)
    return found


def active_bytes(packed: PackedExperts, shape: Shape) -> float:
    """Bytes of the weights that one token reads."""
    return (packed.gate_up.nbytes + packed.down.nbytes) * shape.num_active / shape.num_experts


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
            shape, packed = SHAPES[name], make_experts(SHAPES[name], form)
            found = compare(packed, shape, form, arguments.seconds)
            share = active_bytes(packed, shape) / found[1][0] / 1e9 / bandwidth
            cells = (f"{t * 1e3:.2f} ({loop / t:.2f}, {dense / t:.2f})" for t, loop, dense in found.values())
            print(f"{name:12}{form:15}{share:8.0%}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
