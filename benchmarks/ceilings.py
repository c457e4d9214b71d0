"""Ceilings of this machine: rates of fp32, bf16 and int8 products, and the bandwidth of reading memory.

Every figure of an engine is compared with these, measured in the same run. Prefill cannot be faster than the fp32
product (than the bf16 or int8 product if weights are stored so; on a processor without bf16 products Quire multiplies
in fp32). Decode cannot be faster than memory. `python -m benchmarks.ceilings` prints JSON.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

MATRIX_SIZE = 2048
READ_BYTES = 2**30
"""Bytes to read: far more than any cache holds."""


def measure_ceilings(seconds: float = 1.5) -> dict[str, float]:
    """Median rates, with torch's current number of threads."""
    product_of_bytes = int8_product(MATRIX_SIZE)
    memory = torch.zeros(READ_BYTES // 8, dtype=torch.int64)
    return {
        "threads": torch.get_num_threads(),
        "fp32_gflops": median_rate(packed_product(MATRIX_SIZE, torch.float32), 2 * MATRIX_SIZE**3, seconds),
        "bf16_gflops": median_rate(packed_product(MATRIX_SIZE, torch.bfloat16), 2 * MATRIX_SIZE**3, seconds),
        "int8_gops": median_rate(product_of_bytes, 2 * MATRIX_SIZE**3, seconds),
        # A sum of integers costs one cheap instruction per vector, so it is bound by memory.
        "read_gb_per_s": median_rate(memory.sum, READ_BYTES, seconds),
    }


def packed_product(size: int, dtype: torch.dtype) -> Callable[[], object]:
    """A product of two square matrices by oneDNN, one of them packed like weights: a fifth faster than `@`. A private
    operator of torch. Where oneDNN does not multiply this dtype, it is torch's plain product."""
    rows, weight = torch.randn(2, size, size, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, size)
    except RuntimeError:  # bfloat16 without AVX-512
        return lambda: torch.nn.functional.linear(rows, weight)
    return lambda: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


def int8_product(size: int) -> Callable[[], object]:
    """A product of two square int8 matrices by oneDNN, the fastest that torch offers. A private operator of torch."""
    rows = torch.randint(0, 256, (size, size), dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.randint(-128, 128, (size, size), dtype=torch.int8), None)
    scales, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int32)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def median_rate(run: Callable[[], object], work: float, seconds: float) -> float:
    """Billions of units of `work` per second: the median over repeated calls of `run`."""
    run()
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates) < 3:
        start = time.perf_counter()
        run()
        rates.append(work / (time.perf_counter() - start) / 1e9)
    return round(statistics.median(rates), 1)


if __name__ == "__main__":
    print(json.dumps(measure_ceilings()))
