"""Dense layers in 32, 16, 8 and 4 bits beside torch's and the machine's limits, and what they cost in perplexity.

`python -m benchmarks.quantization`. For each number of rows, every contender runs in turn, round after round, and the
fastest of its runs counts, so that a noisy machine slows all alike. Weights rotate through more memory than the caches
hold: few rows are bound by reading them (GB/s), many by arithmetic (GOP/s, a product and its addition being two).

torch's 8 bits are oneDNN's `qlinear` with the rows quantised by torch, and `qlinear` alone on rows quantised before the
clock starts, which no engine can have. torch's 4 bits are `_weight_int4pack_mm_for_cpu` on rows turned to bfloat16
before the clock starts, since float32 rows take a much slower path. These are private operators; a torch without them
is an error, not a missing column.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ceilings import MATRIX_SIZE, READ_BYTES
from quire import LLM, SamplingParams
from quire.kernels import cpu
from quire.quantization import METHODS

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SHAPES = ((3072, 2048), (1280, 768))
"""Outputs and inputs: a layer of a model of 600 million parameters, and the queries, keys and values of a smaller."""
ROTATED_BYTES = 160 << 20
HELD_OUT = Path(__file__).parents[1] / "tests" / "data" / "held_out.txt"

Run = Callable[[Tensor, int], object]
"""One product: the rows, and which copy of the weight to use."""


class Contender:
    """A way to compute a dense layer. `prepare` makes of the rows what `run` takes, before the clock starts."""

    def __init__(
        self, name: str, make: Callable[[], int], run: Run, prepare: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.name = name
        self.bytes = make()
        for _ in range(ROTATED_BYTES // self.bytes):
            make()
        self.run = run
        self.prepare = prepare or (lambda x: x)
        self.calls = 0
        self.best = math.inf

    def time(self, x: Tensor) -> float:
        self.calls += 1
        start = time.perf_counter()
        self.run(x, self.calls)
        seconds = time.perf_counter() - start
        self.best = min(self.best, seconds)
        return seconds


def own(name: str, weight: Tensor) -> Contender:
    """This project's layer, its weight stored in a float type or as a method of METHODS stores it."""
    n, k = weight.shape
    if name in METHODS:
        stored = METHODS[name].layers
        quantized = []

        def quantize() -> int:
            quantized.append(cpu.quantize_linear([weight], stored.bits, stored.group_size or k))
            return quantized[-1].nbytes

        return Contender(
            name, quantize, lambda x, call: cpu.linear_quantized(x, quantized[call % len(quantized)], None, n)
        )
    packed = []

    def pack() -> int:
        packed.append(cpu.pack_linear([weight], name))
        return packed[-1].nbytes

    return Contender(name, pack, lambda x, call: cpu.linear(x, packed[call % len(packed)], None, n))


def torch_int8(weight: Tensor, *, alone: bool) -> Contender:
    n, k = weight.shape
    scales = weight.abs().amax(1) / 127
    values = (weight / scales[:, None]).round().to(torch.int8)
    zeros = torch.zeros(n, dtype=torch.int32)
    packed: list[Tensor] = []

    def pack() -> int:
        packed.append(torch.ops.onednn.qlinear_prepack(values, None))
        return n * k + 4 * n

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        row_scales = x.abs().amax(1, keepdim=True) / 127
        return (x / row_scales).round_().add_(128).to(torch.uint8), row_scales

    def product(rows: Tensor, call: int) -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, 128, packed[call % len(packed)], scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y

    def whole(x: Tensor, call: int) -> Tensor:
        rows, row_scales = quantize(x)
        return product(rows, call).mul_(row_scales)

    if alone:
        return Contender("qlinear alone", pack, product, lambda x: quantize(x)[0])
    return Contender("qlinear", pack, whole)


def torch_int4(weight: Tensor, group_size: int) -> Contender:
    n, k = weight.shape
    packed: list[tuple[Tensor, Tensor]] = []

    def pack() -> int:
        values = torch.randint(0, 16, (n, k), dtype=torch.int32)
        scales = torch.rand(k // group_size, n, 2)
        packed.append((torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1), scales.bfloat16()))
        return packed[-1][0].nbytes + packed[-1][1].nbytes

    def product(x: Tensor, call: int) -> Tensor:
        values, scales = packed[call % len(packed)]
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, values, group_size, scales)
        return y

    return Contender("int4pack", pack, product, lambda x: x.bfloat16())


def measure(contenders: list[Contender], m: int, k: int, budget: float) -> None:
    """Rounds of all contenders until the time is spent, at least five."""
    x = torch.randn(m, k)
    inputs = [contender.prepare(x) for contender in contenders]
    for contender, rows in zip(contenders, inputs, strict=True):
        contender.time(rows)
        contender.best = math.inf
    spent, rounds = 0.0, 0
    while spent < budget or rounds < 5:
        spent += sum(contender.time(rows) for contender, rows in zip(contenders, inputs, strict=True))
        rounds += 1


def layer_table(n: int, k: int, budget: float) -> list[dict[str, object]]:
    weight = torch.randn(n, k)
    group_size = METHODS["int4"].layers.group_size
    assert group_size is not None
    contenders = [
        own("float32", weight),
        own("bfloat16", weight),
        own("int8", weight),
        torch_int8(weight, alone=False),
        torch_int8(weight, alone=True),
        own("int4", weight),
        torch_int4(weight, group_size),
    ]
    print(f"\n{n} outputs of {k} inputs: milliseconds, GOP/s, GB/s of weights")
    print("rows" + "".join(f"{contender.name:>22}" for contender in contenders))
    table: list[dict[str, object]] = []
    for m in ROWS:
        measure(contenders, m, k, budget)
        line = f"{m:4}"
        for contender in contenders:
            gop, gb = 2 * m * n * k / contender.best / 1e9, contender.bytes / contender.best / 1e9
            line += f"{contender.best * 1e3:10.3f}{gop:6.0f}{gb:6.1f}"
            table.append({"outputs": n, "inputs": k, "rows": m, "layer": contender.name, "seconds": contender.best})
        print(line, flush=True)
    return table


class Ceilings:
    """What the machine does at most, by the fastest of all runs so far: measured before, between and after the tables,
    since a disturbed moment would make a ceiling that layers pass."""

    def __init__(self) -> None:
        self.best: dict[str, float] = {}
        left, right = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE)
        memory = torch.zeros(READ_BYTES // 8, dtype=torch.int64)
        # oneDNN on two square matrices of bytes: the fastest torch offers.
        contender = torch_int8(left, alone=True)
        rows = contender.prepare(right)
        self.runs: dict[str, tuple[Callable[[], object], float]] = {
            "fp32 GFLOP/s": (lambda: left @ right, 2 * MATRIX_SIZE**3),
            "int8 GOP/s": (lambda: contender.run(rows, 0), 2 * MATRIX_SIZE**3),
            "read GB/s": (memory.sum, READ_BYTES),
        }

    def measure(self, repeats: int = 5) -> None:
        for name, (run, work) in self.runs.items():
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                rate = work / (time.perf_counter() - start) / 1e9
                self.best[name] = max(rate, self.best.get(name, 0.0))


def perplexity(
    *,
    dtype: str,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    threads: int | None = None,
    num_tokens: int | None = None,
) -> float:
    """Of the bundled model on the held-out text, in rows of the longest context, each opened as a document is."""
    llm = LLM(
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=2,
        num_blocks=128,
        threads=threads,
    )
    tokenizer = llm.get_tokenizer()
    begin = tokenizer.bos_token_id
    assert begin is not None
    ids = tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"), add_special_tokens=False)[:num_tokens]
    length = llm.memory_plan.max_model_len - 2
    rows = [[begin, *ids[first : first + length]] for first in range(0, len(ids), length)]
    total = 0.0
    for output in llm.generate(rows, SamplingParams(max_tokens=1, prompt_logprobs=0)):
        assert output.prompt_logprobs is not None
        # The first of a position's entries is the token that stands there.
        total -= sum(next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry is not None)
    return math.exp(total / len(ids))


def perplexity_table(threads: int) -> dict[str, float]:
    found = {"float32": perplexity(threads=threads, dtype="float32")}
    found |= {name: perplexity(threads=threads, dtype="float32", quantization=name) for name in METHODS}
    print(f"\nPerplexity of the bundled model on {HELD_OUT.name}")
    for name, value in found.items():
        print(f"  {name:8}{value:9.4f}{value / found['float32'] - 1:+9.2%}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each number of rows")
    parser.add_argument("--output", type=Path, help="also write the figures to this file, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {arguments.threads} threads, {cpu.isa()}, torch {torch.__version__}")
    ceilings = Ceilings()
    ceilings.measure()
    layers = []
    for shape in SHAPES:
        layers += layer_table(*shape, arguments.seconds)
        ceilings.measure()
    print("\nceilings: " + ", ".join(f"{name} {rate:.1f}" for name, rate in ceilings.best.items()))
    # The engine sets its own number of threads, so this comes last.
    figures = {"ceilings": ceilings.best, "layers": layers, "perplexity": perplexity_table(arguments.threads)}
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
