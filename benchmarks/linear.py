"""Dense layers of real models beside every product that torch offers: `python -m benchmarks.linear`.

For each weight format, layer and number of rows, all contenders run in turns, and a contender's figure is the median of
its rounds. Weights rotate through more memory than the caches hold, so that few rows are bound by reading them and many
by arithmetic. The table shows how many times as fast as the fastest other one this project's layer is. Below 1.00 torch
is faster. torch has no product for blocks of GGUF: beside them stand the floats that they become.

Our layer takes and returns float32. If a contender needs another type, converting counts in its time, since an engine
would have to convert; "alone" leaves the conversions out. Most contenders are private operators of torch; a torch
without them is an error, not a missing column.

Builds for other processors are measured on the same machine with torch held to the same instructions:
`QUIRE_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2`.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import measure_ceilings
from benchmarks.make_models import SHAPES
from quire.gguf.block_types import BLOCK_TYPES, BLOCK_TYPES_BY_NAME
from quire.kernels import cpu
from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.blocks import dequantize
from quire.quantization import METHODS

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LAYERS = ("qkv", "o", "gate_up", "down", "head")
BLOCKS = tuple(block.name for block in BLOCK_TYPES.values() if not block.is_float)
FORMATS = ("float32", "bfloat16", *METHODS, *BLOCKS)
ROTATED_BYTES = 96 << 20
MIN_ROUNDS = 5
NOISE = 0.03
"""Noise: medians of identical contenders differ by this much."""

Run = Callable[[Any, Any], Tensor]
"""A product of rows and a stored weight."""


@dataclass(slots=True)
class Contender:
    """A way to compute a dense layer."""

    name: str
    copies: list[Any]
    """Copies of the stored weight."""
    run: Run
    prepare: Callable[[Tensor], Any] = lambda x: x
    """Converts float32 rows to its input type."""
    seconds: list[float] = field(default_factory=list)
    calls: int = 0

    def time(self, rows: Any) -> float:
        self.calls += 1
        weight = self.copies[self.calls % len(self.copies)]
        start = time.perf_counter()
        self.run(rows, weight)
        self.seconds.append(time.perf_counter() - start)
        return self.seconds[-1]


def rotated(make: Callable[[], Any], num_bytes: int) -> list[Any]:
    return [make() for _ in range(ROTATED_BYTES // num_bytes + 1)]


def contenders(name: str, weight: Tensor) -> list[Contender]:
    """All contenders for a weight [outputs, inputs] stored in format `name`; ours first."""
    n, k = weight.shape
    if name in METHODS:
        stored = METHODS[name].layers
        copies = rotated(lambda: cpu.quantize_linear([weight], stored), stored.weight_bytes(n, k))
        ours = Contender("ours", copies, lambda x, w: cpu.linear_quantized(x, w, None, n))
        return [ours, *(of_8_bits(weight) if stored.bits == 8 else of_4_bits(weight, stored.group_size))]
    if name in BLOCKS:
        matrix = random_blocks(name, n, k)
        copies = rotated(lambda: cpu.interleave_blocks(cpu.pack_blocks([matrix])), matrix.rows.nbytes)
        return [
            Contender("ours", copies, lambda x, w: cpu.linear_quantized(x, w, None, n)),
            *of_floats(dequantize(matrix)),
        ]
    rounded = weight.to(getattr(torch, name))
    copies = rotated(lambda: cpu.pack_linear([rounded], name), rounded.nbytes)
    ours = Contender("ours", copies, lambda x, w: cpu.linear(x, w, None, n))
    return [ours, *of_floats(rounded)]


def random_blocks(type_name: str, num_outputs: int, num_inputs: int) -> BlockMatrix:
    """Random codes; scales are small and finite."""
    block = BLOCK_TYPES_BY_NAME[type_name]
    row_bytes = num_inputs // block.num_values * block.num_bytes
    return BlockMatrix(torch.randint(0, 40, (num_outputs, row_bytes)).byte(), type_name)


def whole_and_alone(name: str, copies: list[Any], run: Run, prepare: Callable[[Tensor], Any]) -> list[Contender]:
    """The contender twice: with conversion of rows and result, and without."""
    return [
        Contender(name, copies, lambda x, w: run(prepare(x), w).float()),
        # Use another copy than its twin, which has just loaded that one into the caches.
        Contender(f"{name} alone", copies, run, prepare, calls=len(copies) // 2),
    ]


def of_floats(weight: Tensor) -> list[Contender]:
    mkldnn, mkl = torch.ops.mkldnn, torch.ops.mkl
    plain, size = torch.nn.functional.linear, weight.nbytes
    pointwise = lambda x, w: mkldnn._linear_pointwise(x, w, None, "none", [], "")  # noqa: E731
    reordered = rotated(lambda: mkldnn._reorder_linear_weight(weight, 64), size)
    if weight.dtype == torch.float32:
        mkl_packed = rotated(lambda: mkl._mkl_reorder_linear_weight(weight, 64), size)
        return [
            Contender("F.linear", rotated(weight.clone, size), plain),
            Contender("oneDNN", reordered, pointwise),
            Contender("MKL", mkl_packed, lambda x, w: mkl._mkl_linear(x, w, weight, None, x.shape[0])),
        ]
    return [
        *whole_and_alone("F.linear", rotated(weight.clone, size), plain, Tensor.bfloat16),
        *whole_and_alone("oneDNN", reordered, pointwise, Tensor.bfloat16),
    ]


def of_8_bits(weight: Tensor) -> list[Contender]:
    n, k = weight.shape
    scales, zeros = weight.abs().amax(1) / 127, torch.zeros(n, dtype=torch.int32)
    values, of_bfloat16 = (weight / scales[:, None]).round().to(torch.int8), scales.bfloat16()

    def qlinear(x: tuple[Tensor, Tensor], packed: Tensor) -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            x[0], 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.mul_(x[1][:, None])

    def unsigned_rows(x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows quantised by our kernel, then shifted by 128: signed bytes are a hundred times slower."""
        values, row_scales = cpu.quantize_groups(x, k)
        return values.view(torch.uint8) ^ 128, row_scales[:, 0]

    int8pack = lambda x, w: torch.ops.aten._weight_int8pack_mm(x, w, of_bfloat16)  # noqa: E731
    packed = rotated(lambda: torch.ops.onednn.qlinear_prepack(values, None), n * k)
    return [
        *whole_and_alone("qlinear", packed, qlinear, unsigned_rows),
        *whole_and_alone("int8pack", rotated(values.clone, n * k), int8pack, Tensor.bfloat16),
    ]


def of_4_bits(weight: Tensor, group_size: int) -> list[Contender]:
    n, k = weight.shape
    values, scales = torch.randint(0, 16, (n, k), dtype=torch.int32), torch.rand(k // group_size, n, 2).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    int4pack = lambda x, w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, group_size, scales)  # noqa: E731
    # Its fast path takes bfloat16 rows.
    return whole_and_alone("int4pack", rotated(packed.clone, packed.nbytes), int4pack, Tensor.bfloat16)


def measure(field_of: list[Contender], m: int, k: int, budget: float) -> dict[str, float]:
    """Median seconds of each contender, over rounds of all until the time is spent."""
    x = torch.randn(m, k)
    inputs = [contender.prepare(x) for contender in field_of]
    for contender, rows in zip(field_of, inputs, strict=True):
        contender.time(rows)
        contender.seconds.clear()
    spent = 0.0
    while spent < budget or len(field_of[0].seconds) < MIN_ROUNDS:
        spent += sum(contender.time(rows) for contender, rows in zip(field_of, inputs, strict=True))
    return {contender.name: statistics.median(contender.seconds) for contender in field_of}


def cell(seconds: dict[str, float], *, alone: bool) -> str:
    """A cell of the table: speed of ours over the fastest other; that one's name if it is ahead."""
    others = {name: value for name, value in seconds.items() if name != "ours" and name.endswith(" alone") == alone}
    best = min(others, key=others.__getitem__)
    ratio = others[best] / seconds["ours"]
    return f"{ratio:.2f}" if ratio > 1 - NOISE else f"**{ratio:.2f}** {best}"


def layer_shapes(model: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each of LAYERS, as the engine fuses them."""
    shape = SHAPES[model]
    hidden, width, head_dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head_dim, shape["num_key_value_heads"] * head_dim
    return {
        "qkv": (queries + 2 * keys, hidden),
        "o": (hidden, queries),
        "gate_up": (2 * width, hidden),
        "down": (hidden, width),
        "head": (shape["vocab_size"], hidden),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each cell of the tables")
    parser.add_argument("--output", type=Path, help="also write all medians to this file, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {options.threads} threads, {cpu.isa()}, torch {torch.__version__}; {measure_ceilings(0.3)}")
    figures: list[dict[str, Any]] = []
    for stored in options.formats:
        measured: dict[str, list[dict[str, float]]] = {}
        for model in options.models:
            for layer in options.layers:
                n, k = layer_shapes(model)[layer]
                field_of = contenders(stored, torch.randn(n, k))
                row = measured[f"{model} {layer}"] = []
                for m in options.rows:
                    row.append(measure(field_of, m, k, options.seconds))
                    figures.append({"format": stored, "model": model, "layer": layer, "rows": m, "seconds": row[-1]})
        for alone in (False, True) if any("alone" in name for name in row[-1]) else (False,):
            print(f"\n{stored}: speed of ours over the fastest other{' alone' if alone else ''}\n")
            print("| rows | " + " | ".join(map(str, options.rows)) + " |\n" + "| --- " * (len(options.rows) + 1) + "|")
            for name, row in measured.items():
                print(f"| {name} | " + " | ".join(cell(seconds, alone=alone) for seconds in row) + " |", flush=True)
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
