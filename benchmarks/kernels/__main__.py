"""CPU kernels beside the ceilings of the machine, measured in the same run: `python -m benchmarks.kernels`.

Decode attention is bound by reading the KV cache: its ceiling is the rate at which torch sums a tensor too large for
any cache. Prefill attention is bound by arithmetic: its ceiling is torch.mm of two 2048 x 2048 float32 matrices. The
ceiling is measured again before every line, so that a noisy machine slows both. Each figure is the best of the
repeats.
"""

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from quire.attention import AttentionShape, StepArrays
from quire.attention.plan import plan_attention
from quire.kernels import AttentionParams, KVLayer, cpu

BLOCK_SIZE = 16
# Decode walks through several layers, so that no cache of the processor holds the data read next.
MIN_KV_BYTES = 512 << 20
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}

# sequences, context, query heads, KV heads, head size
DECODE = [
    (8, 1024, 12, 4, 64),
    (64, 1024, 12, 4, 64),
    (16, 2048, 32, 8, 128),
    (16, 1024, 12, 12, 64),
    (1, 16384, 32, 8, 128),
]
# Contexts of decode steps, from one long sequence to many short ones.
LOADS = {
    "1 x 8k": [8192],
    "4 x 2k": [2048] * 4,
    "16 x 512": [512] * 16,
    "64 x 256": [256] * 64,
    "256 x 64": [64] * 256,
    "8k + 63 x 128": [8192] + [128] * 63,
}
# Query heads, KV heads, shared tokens, sequences per group, groups, tokens of each sequence's own.
SHARED = [
    (12, 4, 512, 64, 1, 48),
    (12, 4, 256, 8, 8, 32),
    (12, 4, 128, 64, 1, 128),
    (12, 4, 2048, 16, 1, 64),
    (12, 4, 1024, 2, 32, 64),
    (12, 12, 512, 64, 1, 48),
    (12, 12, 256, 8, 8, 32),
    (12, 12, 128, 8, 2, 128),
    (12, 12, 64, 4, 8, 64),
    (32, 4, 512, 16, 1, 64),
]
# new tokens, context, query heads, KV heads, head size
PREFILL = [(2048, 2048, 12, 4, 64), (2048, 2048, 12, 4, 128), (512, 4096, 12, 4, 64), (2048, 2048, 12, 12, 64)]


class Attention:
    """One attention call over `layers` in turn."""

    def __init__(
        self,
        contexts: Sequence[int],
        new: int,
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        group: int = 1,
        num_shared: int = 0,
        share_prefixes: bool = True,
    ) -> None:
        """Sequences of these contexts with `new` new tokens each, over layers of MIN_KV_BYTES in total.

        Groups of `group` sequences share their first `num_shared` tokens.
        """
        num_heads, num_kv_heads, self.head_dim = heads
        sequences, lengths = len(contexts), np.array(contexts, dtype=np.int32)
        blocks = -(-lengths // BLOCK_SIZE)
        tables = np.zeros((sequences, blocks.max()), dtype=np.int32)
        free = np.random.default_rng(0).permutation(blocks.sum()).astype(np.int32)
        tables[np.arange(blocks.max()) < blocks[:, None]] = free
        common = num_shared // BLOCK_SIZE
        tables[:, :common] = tables[np.arange(sequences) // group * group, :common]
        shapes = cpu.kv_cache_shapes(len(free), num_kv_heads, BLOCK_SIZE, self.head_dim, scaled=dtype == torch.int8)
        # One byte value that is neither subnormal nor large in any type.
        layer_bytes = sum(np.prod(shape) for shape in shapes) * dtype.itemsize
        self.layers = [
            KVLayer(
                *(
                    torch.full([*shape[:-1], shape[-1] * dtype.itemsize], 0x3C, dtype=torch.uint8).view(dtype)
                    for shape in shapes
                )
            )
            for _ in range(-(-MIN_KV_BYTES // int(layer_bytes)))
        ]
        token_bytes = num_kv_heads * (2 * self.head_dim * dtype.itemsize + (8 if dtype == torch.int8 else 0))
        self.kv_bytes = sum(contexts) * token_bytes
        self.q = torch.randn(sequences * new, num_heads, self.head_dim)
        starts, slots = np.arange(sequences + 1, dtype=np.int32) * new, np.zeros(sequences * new, dtype=np.int32)
        shape = AttentionShape(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self.head_dim,
            block_size=BLOCK_SIZE,
            num_threads=torch.get_num_threads(),
            kv_element_size=dtype.itemsize,
        )
        step = StepArrays(starts, lengths, tables, slots)
        self.plan = plan_attention(step, shape, share_prefixes=share_prefixes)
        self.params = AttentionParams(self.head_dim**-0.5)
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return cpu.paged_attention(self.q, self.layers[self.calls % len(self.layers)], self.plan, self.params)


def best_seconds(function: Callable[[], object], budget: float) -> float:
    """The fastest of the runs within the time budget, at least five, after one to warm up."""
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
        attention = Attention([context] * sequences, 1, (num_heads, num_kv_heads, head_dim), dtype)
        kv_bytes = attention.kv_bytes
        ceiling = read.nbytes / best_seconds(read.sum, budget)
        seconds = best_seconds(attention, budget)
        rate = kv_bytes / seconds
        print(
            f"{sequences:6}{context:9}{num_heads:7}{num_kv_heads:10}{head_dim:10}{kv_bytes / 1e6:8.1f}"
            f"{seconds * 1e3:9.2f}{rate / 1e9:8.1f}{ceiling / 1e9:9.1f}{rate / ceiling:7.0%}"
        )


def load_table(dtype: torch.dtype, budget: float) -> None:
    """Balance of the planner over the cores: 12 query heads on 4 KV heads of 64."""
    read = torch.ones(64 << 20)
    print(f"\nDecode steps, {dtype}, {cpu.isa()}: GB/s of KV read")
    print("  load             items   KV MB       ms    GB/s  ceiling  share")
    for name, contexts in LOADS.items():
        attention = Attention(contexts, 1, (12, 4, 64), dtype)
        ceiling = read.nbytes / best_seconds(read.sum, budget / 2)
        seconds = best_seconds(attention, budget)
        rate = attention.kv_bytes / seconds
        print(
            f"  {name:16}{len(attention.plan.work):6}{attention.kv_bytes / 1e6:8.1f}{seconds * 1e3:9.3f}"
            f"{rate / 1e9:8.1f}{ceiling / 1e9:9.1f}{rate / ceiling:7.0%}"
        )


def sharing_table(dtype: torch.dtype, budget: float) -> None:
    """Prefixes read once against prefixes read by every sequence, in turns; heads of 64."""
    print(f"\nDecoding after shared prefixes, {dtype}: milliseconds")
    print("  heads  kv heads  shared  sharers  groups  own   read by all   as planned   ratio")
    for num_heads, num_kv_heads, num_shared, sharers, groups, own in SHARED:
        apart, planned = (
            Attention(
                [num_shared + own] * (sharers * groups),
                1,
                (num_heads, num_kv_heads, 64),
                dtype,
                group=sharers,
                num_shared=num_shared,
                share_prefixes=share,
            )
            for share in (False, True)
        )
        rounds = [[best_seconds(call, budget / 6) * 1e3 for call in (apart, planned)] for _ in range(3)]
        by_all, once = map(min, zip(*rounds, strict=True))
        print(
            f"{num_heads:7}{num_kv_heads:10}{num_shared:8}{sharers:9}{groups:8}{own:5}{by_all:14.3f}{once:13.3f}"
            f"{by_all / once:8.2f}" + ("" if len(planned.plan.shared) else "  (not shared)")
        )


def prefill_table(dtype: torch.dtype, budget: float) -> None:
    left, right, product = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.empty(2048, 2048)
    print(f"\nPrefill attention, {dtype}: GFLOP/s, counting only unmasked keys")
    print("   new  context  heads  kv heads  head dim       ms  GFLOP/s  ceiling  share")
    for new, context, num_heads, num_kv_heads, head_dim in PREFILL:
        attention = Attention([context], new, (num_heads, num_kv_heads, head_dim), dtype)
        ceiling = 2 * 2048**3 / best_seconds(lambda: torch.mm(left, right, out=product), budget)
        seconds = best_seconds(attention, budget)
        rate = 4 * head_dim * num_heads * sum(range(context - new + 1, context + 1)) / seconds
        print(
            f"{new:6}{context:9}{num_heads:7}{num_kv_heads:10}{head_dim:10}{seconds * 1e3:9.1f}"
            f"{rate / 1e9:9.1f}{ceiling / 1e9:9.1f}{rate / ceiling:7.0%}"
        )


def small_table(budget: float) -> None:
    """Cost of the operations around attention, for one token (mostly the call) and for a prefill chunk."""
    print("\nSmall operations, hidden size 768, 12 heads of 64, 4 KV heads: microseconds")
    print("                      1 token   512 tokens")
    # Unit weights and true rotations: what runs in place, again and again, must not shrink the numbers to subnormals.
    weight, head_weight, angles = torch.ones(768), torch.ones(64), torch.rand(4096, 32)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    kv = KVLayer(torch.zeros(64, 4, 64, BLOCK_SIZE), torch.zeros(64, 4, BLOCK_SIZE, 64))
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
            "write_kv": partial(cpu.write_kv, k, v, kv, positions),
        }
        for name, operation in operations.items():
            columns.setdefault(name, []).append(best_seconds(operation, budget / 5) * 1e6)
    for name, (one, many) in columns.items():
        print(f"  {name:18}{one:9.1f}{many:13.1f}")


def planner_table(budget: float) -> None:
    print(
        "\nPlanning one step of decodes: milliseconds; then where each 8 sequences have half of their blocks in common"
    )
    for sequences in (1, 256, 1024):
        tables = np.arange(sequences * 64, dtype=np.int32).reshape(sequences, 64)
        shared = tables.copy()
        shared[:, :32] = tables[np.arange(sequences) // 8 * 8, :32]
        shape = AttentionShape(
            num_heads=12, num_kv_heads=4, head_dim=64, block_size=BLOCK_SIZE, num_threads=torch.get_num_threads()
        )
        starts, lengths = np.arange(sequences + 1, dtype=np.int32), np.full(sequences, 1000, dtype=np.int32)
        slots = np.zeros(sequences, dtype=np.int32)
        steps = [StepArrays(starts, lengths, each, slots) for each in (tables, shared)]
        seconds = [best_seconds(partial(plan_attention, step, shape), budget / 5) for step in steps]
        print(f"  {sequences:5} sequences {seconds[0] * 1e3:8.3f}{seconds[1] * 1e3:8.3f}")


ATTENTION_TABLES = {"decode": decode_table, "loads": load_table, "sharing": sharing_table, "prefill": prefill_table}
OTHER_TABLES = {"small": small_table, "planner": planner_table}
TABLES = (*ATTENTION_TABLES, *OTHER_TABLES)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16", "int8"], help="dtypes of the KV cache"
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {arguments.threads} threads, {cpu.isa()}, torch {torch.__version__}")
    for table in arguments.tables:
        if table in ATTENTION_TABLES:
            for name in arguments.dtypes:
                ATTENTION_TABLES[table](DTYPES[name], arguments.seconds)
        else:
            OTHER_TABLES[table](arguments.seconds)


if __name__ == "__main__":
    main()
