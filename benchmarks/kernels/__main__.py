"""The CPU kernels beside the ceilings of the machine, measured in the same run: `python -m benchmarks.kernels`.

Decode attention is bound by reading the KV cache: its ceiling is the rate at which torch sums a tensor too large for
any cache. Prefill attention is bound by arithmetic: its ceiling is torch.mm of two 2048 x 2048 float32 matrices. The
ceiling is measured again before every line, so that a noisy machine slows both; each figure is the best of the repeats.
"""

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from quire.attention.plan import CpuAttentionPlan, plan_attention
from quire.kernels import cpu

BLOCK_SIZE = 16
# Decode walks through several layers, so that no cache of the processor holds what is read next.
MIN_KV_BYTES = 512 << 20
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# sequences, context, query heads, KV heads, head size
DECODE = [
    (8, 1024, 12, 4, 64),
    (64, 1024, 12, 4, 64),
    (16, 2048, 32, 8, 128),
    (16, 1024, 12, 12, 64),
    (1, 16384, 32, 8, 128),
]
# new tokens, context, query heads, KV heads, head size
PREFILL = [(2048, 2048, 12, 4, 64), (2048, 2048, 12, 4, 128), (512, 4096, 12, 4, 64), (2048, 2048, 12, 12, 64)]


class Attention:
    """One attention call over `layers` caches in turn."""

    def __init__(
        self, sequences: int, new: int, context: int, heads: tuple[int, int, int], dtype: torch.dtype, layers: int
    ) -> None:
        num_heads, num_kv_heads, self.head_dim = heads
        blocks = -(-context // BLOCK_SIZE)
        tables = torch.randperm(sequences * blocks).to(torch.int32).view(sequences, blocks).numpy()
        keys = (sequences * blocks, num_kv_heads, self.head_dim, BLOCK_SIZE)
        values = (sequences * blocks, num_kv_heads, BLOCK_SIZE, self.head_dim)
        self.caches = [
            (torch.full(keys, 0.5, dtype=dtype), torch.full(values, 0.5, dtype=dtype)) for _ in range(layers)
        ]
        self.q = torch.randn(sequences * new, num_heads, self.head_dim)
        self.plan: CpuAttentionPlan = plan_attention(
            np.arange(sequences + 1, dtype=np.int32) * new,
            np.full(sequences, context, dtype=np.int32),
            tables,
            np.zeros(sequences * new, dtype=np.int32),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self.head_dim,
            block_size=BLOCK_SIZE,
            num_threads=torch.get_num_threads(),
        )
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        k_cache, v_cache = self.caches[self.calls % len(self.caches)]
        return cpu.paged_attention(self.q, k_cache, v_cache, self.plan, self.head_dim**-0.5)


def best_seconds(function: Callable[[], object], budget: float) -> float:
    """The fastest of the runs that fit the budget, five at least, after one to warm up."""
    function()
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < budget:
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def decode_table(dtype: torch.dtype, budget: float) -> None:
    read = torch.ones(64 << 20)
    print(f"\nDecode attention, {dtype}: GB/s of KV read")
    print("  seqs  context  heads  kv heads  head dim   KV MB       ms    GB/s  ceiling  share")
    for sequences, context, num_heads, num_kv_heads, head_dim in DECODE:
        kv_bytes = 2 * sequences * context * num_kv_heads * head_dim * dtype.itemsize
        layers = -(-MIN_KV_BYTES // kv_bytes)
        attention = Attention(sequences, 1, context, (num_heads, num_kv_heads, head_dim), dtype, layers)
        ceiling = read.nbytes / best_seconds(read.sum, budget)
        seconds = best_seconds(attention, budget)
        rate = kv_bytes / seconds
        print(
            f"{sequences:6}{context:9}{num_heads:7}{num_kv_heads:10}{head_dim:10}{kv_bytes / 1e6:8.1f}"
            f"{seconds * 1e3:9.2f}{rate / 1e9:8.1f}{ceiling / 1e9:9.1f}{rate / ceiling:7.0%}"
        )


def prefill_table(dtype: torch.dtype, budget: float) -> None:
    left, right, product = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.empty(2048, 2048)
    print(f"\nPrefill attention, {dtype}: GFLOP/s, counting what the causal mask leaves")
    print("   new  context  heads  kv heads  head dim       ms  GFLOP/s  ceiling  share")
    for new, context, num_heads, num_kv_heads, head_dim in PREFILL:
        attention = Attention(1, new, context, (num_heads, num_kv_heads, head_dim), dtype, layers=1)
        ceiling = 2 * 2048**3 / best_seconds(lambda: torch.mm(left, right, out=product), budget)
        seconds = best_seconds(attention, budget)
        rate = 4 * head_dim * num_heads * sum(range(context - new + 1, context + 1)) / seconds
        print(
            f"{new:6}{context:9}{num_heads:7}{num_kv_heads:10}{head_dim:10}{seconds * 1e3:9.1f}"
            f"{rate / 1e9:9.1f}{ceiling / 1e9:9.1f}{rate / ceiling:7.0%}"
        )


def small_table(budget: float) -> None:
    """What the operations around attention cost for one token (mostly the call) and for a prefill chunk."""
    print("\nSmall operations, hidden size 768, 12 heads of 64, 4 KV heads: microseconds")
    print("                      1 token   512 tokens")
    # Unit weights and true rotations: what runs in place, again and again, must not shrink the numbers to subnormals.
    weight, head_weight, angles = torch.ones(768), torch.ones(64), torch.rand(4096, 32)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    caches = torch.zeros(64, 4, 64, BLOCK_SIZE), torch.zeros(64, 4, BLOCK_SIZE, 64)
    columns: dict[str, list[float]] = {}
    for tokens in (1, 512):
        x, wide = torch.randn(tokens, 768), torch.randn(tokens, 2 * 2048)
        qkv = torch.randn(tokens, 20, 64)
        positions = torch.arange(tokens, dtype=torch.int32)
        q, k, v = qkv.split([12, 4, 4], dim=1)
        operations: dict[str, Callable[[], object]] = {
            "rms_norm": partial(cpu.rms_norm, x, weight, 1e-5),
            "add_rms_norm": partial(cpu.add_rms_norm, x, torch.zeros_like(x), weight, 1e-5),
            "rms_norm_heads_": partial(cpu.rms_norm_heads_, q, head_weight, 1e-5),
            "rotary_": partial(cpu.rotary_, q, k, positions, cos_sin),
            "silu_and_mul": partial(cpu.silu_and_mul, wide),
            "gelu_and_mul": partial(cpu.gelu_and_mul, wide, tanh=True),
            "write_kv": partial(cpu.write_kv, k, v, *caches, positions),
        }
        for name, operation in operations.items():
            columns.setdefault(name, []).append(best_seconds(operation, budget / 5) * 1e6)
    for name, (one, many) in columns.items():
        print(f"  {name:18}{one:9.1f}{many:13.1f}")


def planner_table(budget: float) -> None:
    print("\nPlanning one step of decodes: milliseconds")
    for sequences in (1, 256, 1024):
        plan = partial(
            plan_attention,
            np.arange(sequences + 1, dtype=np.int32),
            np.full(sequences, 1000, dtype=np.int32),
            np.zeros((sequences, 64), dtype=np.int32),
            np.zeros(sequences, dtype=np.int32),
            num_heads=12,
            num_kv_heads=4,
            head_dim=64,
            block_size=BLOCK_SIZE,
            num_threads=torch.get_num_threads(),
        )
        print(f"  {sequences:5} sequences {best_seconds(plan, budget / 5) * 1e3:8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16"], help="of the KV cache")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {arguments.threads} threads, {cpu.isa()}, torch {torch.__version__}")
    for name in arguments.dtypes:
        decode_table(DTYPES[name], arguments.seconds)
        prefill_table(DTYPES[name], arguments.seconds)
    small_table(arguments.seconds)
    planner_table(arguments.seconds)


if __name__ == "__main__":
    main()
