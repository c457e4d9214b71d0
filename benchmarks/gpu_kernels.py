"""The GPU kernels beside the ceilings of the card, measured in the same run: rows of the table of `benchmarks.gpu`.

Decode attention is bound by reading the KV cache: its ceiling is the bytes a second that a copy moves, read and
written. Prefill attention is bound by arithmetic: its ceiling is the
rate of a large bfloat16 product. Beside them stand gathering KV for torch's own attention, and FlashInfer where it is
installed. Every launch is timed from a CUDA graph, over several layers' caches in turn, so that no cache of the card
holds what is read next.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quire.backends import choose_backend

BLOCK_SIZE = 64
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
"""Of Llama-3.1-8B."""
MIN_KV_BYTES = 1 << 30
"""Read between two visits to the same cache: far more than the card's L2 holds."""
RUNS = 20
DECODE = [(1, 1024), (1, 32768), (8, 4096), (64, 512), (64, 4096), (256, 512), (256, 1024), (256, 4096)]
"""Sequences, context."""
RAGGED = [32768] + [512] * 63
SHARED = [(16, 1024), (64, 512), (64, 4096), (256, 1024)]
"""Sequences, keys that all of them begin with; as many again of each one's own."""
PREFILL = [2048, 4096, 8192, 16384]
SMALL_TOKENS = 256


class Figure(NamedTuple):
    """A row of the table."""

    what: str
    measured: str
    target: str = ""
    limit: str = ""


def seconds_of(launches: Sequence[Callable[[], object]]) -> float:
    """Of one launch: the median over RUNS replays of a graph that makes all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(np.median(times)) / len(launches)


class Batch:
    """Sequences of given contexts whose last `new` tokens are computed, with caches for as many layers as it takes."""

    def __init__(
        self, contexts: Sequence[int], new: int, kv_dtype: torch.dtype, shared: int = 0, **options: Any
    ) -> None:
        """Of `shared` keys all have the same blocks; `options` are those of `PlanBuffers`."""
        from quire.attention.triton import PlanBuffers, plan_attention

        device = torch.device("cuda")
        self.contexts = np.array(contexts, dtype=np.int32)
        num_tokens = new * len(contexts)
        num_blocks = -(-self.contexts // BLOCK_SIZE)
        self.tables = np.zeros((len(contexts), num_blocks.max()), dtype=np.int32)
        free = np.random.default_rng(0).permutation(int(num_blocks.sum())).astype(np.int32)
        for row, count in enumerate(num_blocks):
            self.tables[row, :count], free = free[:count], free[count:]
        self.tables[:, : shared // BLOCK_SIZE] = self.tables[0, : shared // BLOCK_SIZE]
        self.kv_bytes = 2 * int(self.contexts.sum()) * NUM_KV_HEADS * HEAD_DIM * kv_dtype.itemsize
        shape = (int(num_blocks.sum()), NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        num_layers = min(64, max(1, -(-MIN_KV_BYTES // self.kv_bytes)))
        self.layers = [
            (torch.randn(shape, device=device, dtype=torch.bfloat16).to(kv_dtype),
             torch.randn(shape, device=device, dtype=torch.bfloat16).to(kv_dtype))
            for _ in range(num_layers)
        ]  # fmt: skip
        self.q = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, device=device, dtype=torch.bfloat16)
        buffers = PlanBuffers(
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            block_size=BLOCK_SIZE,
            max_num_seqs=len(contexts),
            max_num_tokens=num_tokens,
            max_blocks=self.tables.shape[1],
            device=device,
            kv_element_size=kv_dtype.itemsize,
            **options,
        )
        self.plan = plan_attention(
            np.arange(0, num_tokens + 1, new, dtype=np.int32),
            self.contexts,
            self.tables,
            np.full(num_tokens, -1, dtype=np.int32),
            buffers=buffers,
        )
        # flops of both products, of the keys that each new token sees
        seen = self.contexts.astype(np.int64) * new - new * (new - 1) // 2
        self.flops = 4 * int(seen.sum()) * NUM_HEADS * HEAD_DIM

    def seconds(self) -> float:
        from quire.kernels.triton import paged_attention

        scale = HEAD_DIM**-0.5
        return seconds_of([partial(paged_attention, self.q, k, v, self.plan, scale) for k, v in self.layers])

    def gathered_seconds(self) -> float:
        """KV gathered by the block table, then torch's attention: of sequences of one length, one new token each."""
        tables = torch.from_numpy(self.tables).long().cuda()
        length = int(self.contexts[0])
        group = NUM_HEADS // NUM_KV_HEADS
        q = self.q.view(len(tables), NUM_KV_HEADS, group, HEAD_DIM)

        def attend(k: Tensor, v: Tensor) -> Tensor:
            keys, values = (each[tables].transpose(1, 2).flatten(2, 3)[:, :, :length] for each in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, keys, values)

        return seconds_of([partial(attend, k, v) for k, v in self.layers])

    def flashinfer_seconds(self) -> float | None:
        try:
            import flashinfer
        except ImportError:
            return None
        workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        counts = -(-self.contexts // BLOCK_SIZE)
        indices = np.concatenate([row[:count] for row, count in zip(self.tables, counts, strict=True)])
        wrapper.plan(
            torch.from_numpy(np.concatenate(([0], counts.cumsum())).astype(np.int32)).cuda(),
            torch.from_numpy(indices).cuda(),
            torch.from_numpy(((self.contexts - 1) % BLOCK_SIZE + 1).astype(np.int32)).cuda(),
            NUM_HEADS,
            NUM_KV_HEADS,
            HEAD_DIM,
            BLOCK_SIZE,
            q_data_type=self.q.dtype,
            kv_data_type=self.layers[0][0].dtype,
        )
        return seconds_of([partial(wrapper.run, self.q, layer) for layer in self.layers])


def ceilings() -> tuple[float, float]:
    """Bytes a second that a copy moves, read and written; floating-point operations a second of a bfloat16 product."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds_of([lambda: target.copy_(source)])
    left, right = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return copy, 2 * 8192**3 / seconds_of([lambda: left @ right])


def decode_figures(copy_rate: float) -> list[Figure]:
    figures = []
    for kv_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        for num_seqs, context in DECODE:
            batch = Batch([context] * num_seqs, 1, kv_dtype)
            seconds = batch.seconds()
            share = batch.kv_bytes / seconds / copy_rate
            megabytes = batch.kv_bytes / 1e6
            name = f"decode {num_seqs} × {context}, {str(kv_dtype).removeprefix('torch.')} KV ({megabytes:.0f} MB)"
            target = "85 %" if megabytes >= 200 else "60 %" if megabytes >= 64 else ""
            figures.append(Figure(name, f"{seconds * 1e6:.1f} µs, {share:.0%} of the copy rate", target))
            if kv_dtype is torch.bfloat16 and megabytes >= 200:
                figures.append(Figure("… against gather + SDPA", f"{batch.gathered_seconds() / seconds:.2f}×", "2.5×"))
                other = batch.flashinfer_seconds()
                shown = "not installed" if other is None else f"{other / seconds:.2f}×"
                figures.append(Figure("… against FlashInfer", shown, "1.0×"))
    ragged = Batch(RAGGED, 1, torch.bfloat16).seconds()
    balanced = Batch([sum(RAGGED) // len(RAGGED)] * len(RAGGED), 1, torch.bfloat16).seconds()
    figures.append(Figure("ragged (32k + 63 × 512) against the balanced batch", f"{ragged / balanced:.2f}×", "≤ 1.3×"))
    return figures


def sharing_figures() -> list[Figure]:
    """Prefixes read once for all sequences, against the same batch planned without; sharing must not lose 3 %."""
    figures = []
    for num_seqs, shared in SHARED:
        contexts = [2 * shared] * num_seqs
        batch = Batch(contexts, 1, torch.bfloat16, shared)
        alone = Batch(contexts, 1, torch.bfloat16, shared, min_shared_bytes=float("inf")).seconds()
        shown = f"{alone / batch.seconds():.2f}×" if batch.plan.shared.num_programs else "not shared"
        figures.append(
            Figure(f"decode {num_seqs} × {2 * shared}, half of it shared, against not sharing", shown, "≥ 0.97×")
        )
    return figures


def prefill_figures(matrix_rate: float) -> list[Figure]:
    figures = []
    for length in PREFILL:
        batch = Batch([length], length, torch.bfloat16)
        share = batch.flops / batch.seconds() / matrix_rate
        figures.append(Figure(f"prefill {length}", f"{share:.0%} of the matrix rate", "50 %"))
    return figures


def small_figures(copy_rate: float) -> list[Figure]:
    """The small kernels of a decode step of SMALL_TOKENS sequences, and sampling from Qwen3's vocabulary."""
    from quire.kernels import triton as kernels
    from quire.kernels.triton.sampling import SamplingRows, sample

    def empty(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    hidden, inner = 4096, 14336
    x, residual, weight = empty(SMALL_TOKENS, hidden), empty(SMALL_TOKENS, hidden), empty(hidden)
    gates = empty(SMALL_TOKENS, 2 * inner)
    logits = empty(SMALL_TOKENS, 151_936)

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((SMALL_TOKENS,), value, device="cuda", dtype=dtype)

    rows = SamplingRows(
        temperature=column(0.7, torch.float32),
        top_k=column(50, torch.int32),
        top_p=column(0.9, torch.float64),
        min_p=column(0.0, torch.float32),
        keys=torch.arange(SMALL_TOKENS, device="cuda"),
        positions=column(0, torch.int64),
    )
    greedy = replace(rows, temperature=column(0.0, torch.float32))
    plain = replace(rows, top_k=column(0, torch.int32), top_p=column(1.0, torch.float64))
    one = SamplingRows(**{field.name: getattr(greedy, field.name)[:1] for field in fields(greedy)})
    timed: list[tuple[str, int, Callable[[], object]]] = [
        ("add + RMSNorm", 4 * x.nbytes, lambda: kernels.add_rms_norm(x, residual, weight, 1e-5)),
        ("SiLU and multiply", gates.nbytes * 3 // 2, lambda: kernels.silu_and_mul(gates)),
        ("sampling, greedy", logits.nbytes, lambda: sample(logits, greedy)),
        ("sampling, temperature 0.7", logits.nbytes, lambda: sample(logits, plain)),
        ("sampling, top-k 50, top-p 0.9", logits.nbytes, lambda: sample(logits, rows)),
        ("of these one, greedy", logits[:1].nbytes, lambda: sample(logits[:1], one)),
    ]
    figures = []
    for name, num_bytes, launch in timed:
        seconds = seconds_of([launch])
        shown = f"{seconds * 1e6:.1f} µs, {num_bytes / seconds / copy_rate:.0%} of the copy rate"
        figures.append(Figure(f"{name}, {SMALL_TOKENS} rows", shown))
    return figures


def kernel_figures() -> list[Figure]:
    """The ceilings, and what the Triton kernels make of them where the card has them."""
    copy_rate, matrix_rate = ceilings()
    figures = [
        Figure("copy rate", f"{copy_rate / 1e12:.2f} TB/s"),
        Figure("matrix rate, bf16", f"{matrix_rate / 1e12:.0f} TFLOP/s"),
    ]
    if choose_backend("auto", "cuda", torch.cuda.get_device_capability()) != "triton":
        return figures
    figures += decode_figures(copy_rate)
    figures += sharing_figures()
    figures += prefill_figures(matrix_rate)
    return [*figures, *small_figures(copy_rate)]
