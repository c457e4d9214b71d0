"""What this machine can do at most: the rates of fp32, bf16 and int8 products and the bandwidth of reading memory.

Every figure of an engine is read against these, taken in the same run: prefill cannot pass the first (the others with
weights in bf16 or int8; a processor without bf16 products is slow at them, and Quire then multiplies fp32), decode
cannot pass the last. `python -m benchmarks.ceilings` prints them as JSON.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

MATRIX_SIZE = 2048
READ_BYTES = 2**30
"""Far more than any cache holds."""


def measure_ceilings(seconds: float = 1.5) -> dict[str, float]:
    """Median rates, with the threads torch is set to."""
    product_of_bytes = int8_product(MATRIX_SIZE)
    memory = torch.zeros(READ_BYTES // 8, dtype=torch.int64)
    return {
        "threads": torch.get_num_threads(),
        "fp32_gflops": median_rate(packed_product(MATRIX_SIZE, torch.float32), 2 * MATRIX_SIZE**3, seconds),
        "bf16_gflops": median_rate(packed_product(MATRIX_SIZE, torch.bfloat16), 2 * MATRIX_SIZE**3, seconds),
        "int8_gops": median_rate(product_of_bytes, 2 * MATRIX_SIZE**3, seconds),
        # A sum of integers costs one cheap instruction per vector, so memory is what it waits for.
        "read_gb_per_s": median_rate(memory.sum, READ_BYTES, seconds),
    }


def packed_product(size: int, dtype: torch.dtype) -> Callable[[], object]:
    """A product of two square matrices by oneDNN, one of them packed as weights are: faster than `@` by a fifth (a
    private operator)."""
    rows, weight = torch.randn(2, size, size, dtype=dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, size)
    return lambda: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


def int8_product(size: int) -> Callable[[], object]:
    """A product of two square matrices of bytes by oneDNN, the fastest that torch offers (a private operator)."""
    rows = torch.randint(0, 256, (size, size), dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.randint(-128, 128, (size, size), dtype=torch.int8), None)
    scales, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int32)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def median_rate(run: Callable[[], object], work: float, seconds: float) -> float:
    """Billions of `work` units per second over repeats of `run` that fill the time."""
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
