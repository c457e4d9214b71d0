"""GPU kernels beside the ceilings of the card, measured in the same run: rows of the table of `benchmarks.gpu`.

Decode attention is bound by reading the KV cache: its ceiling is the bytes per second that a copy reads and writes.
Prefill attention is bound by arithmetic: its ceiling is the rate of a large bfloat16 product. For comparison, the table
has torch's attention over gathered KV, and FlashInfer if it is installed. Every launch is timed from a CUDA graph, over
the caches of several layers in turn, so that no cache of the card holds the data that is read next.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_table import Figure
from quire.attention import AttentionShape, StepArrays
from quire.kernels import AttentionParams, KVLayer

BLOCK_SIZE = 64
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
"""Heads of Llama-3.1-8B."""
MIN_KV_BYTES = 1 << 30
"""Bytes read between two visits to the same cache: far more than the card's L2 holds."""
RUNS = 20
LARGE_DECODE = [(64, 4096), (256, 1024), (256, 4096)]
"""Sequences and context; a layer's KV is 200 MB or more."""
SMALL_DECODE = [(1, 1024), (1, 32768), (8, 4096), (64, 512), (256, 512)]
RAGGED = [32768] + [512] * 63
SHARED = [(16, 1024), (64, 512), (64, 4096), (256, 1024)]
"""Sequences and shared keys; each sequence has as many keys of its own."""
PREFILL = [2048, 4096, 8192, 16384]
SMALL_TOKENS = 256
HIDDEN, INNER, VOCAB = 4096, 14_336, 151_936
"""Vocabularies of Llama-3.1-8B and Qwen3."""
CEILING_BYTES, CEILING_SIZE = 1 << 30, 8192
"""Bytes copied, and the side of the product."""


class Card:
    """A CUDA device, and its clock."""

    device = torch.device("cuda")

    @property
    def name(self) -> str:
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"

    def seconds_of(self, launches: Sequence[Callable[[], object]]) -> float:
        """Seconds of one launch: the median over RUNS replays of a graph that makes all of them."""
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
        return self.time(graph.replay) / len(launches)

    def time(self, run: Callable[[], object]) -> float:
        """Median of RUNS, in seconds of the device."""
        times = []
        for _ in range(RUNS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return float(np.median(times))

    def clean_up(self) -> None:
        """Free unused memory of the device."""
        gc.collect()
        torch.cuda.empty_cache()


class Batch:
    """Sequences of given contexts whose last `new` tokens are computed, with caches for enough layers."""

    def __init__(
        self, card: Card, contexts: Sequence[int], new: int, kv_dtype: torch.dtype, shared: int = 0, **options: Any
    ) -> None:
        """All sequences share the blocks of `shared` keys; `options` go to `PlanBuffers`."""
        from quire.attention.triton import PlanBuffers, plan_attention

        self.card, device = card, card.device
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
            KVLayer(*(torch.randn(shape, device=device, dtype=torch.bfloat16).to(kv_dtype) for _ in range(2)))
            for _ in range(num_layers)
        ]
        self.q = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, device=device, dtype=torch.bfloat16)
        of_attention = AttentionShape(
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            block_size=BLOCK_SIZE,
            max_num_seqs=len(contexts),
            max_num_tokens=num_tokens,
            max_blocks=self.tables.shape[1],
            device=device,
            kv_element_size=kv_dtype.itemsize,
        )
        starts, slots = np.arange(0, num_tokens + 1, new, dtype=np.int32), np.full(num_tokens, -1, dtype=np.int32)
        step = StepArrays(starts, self.contexts, self.tables, slots)
        self.plan = plan_attention(step, PlanBuffers(of_attention, **options))
        # operations of both products, over the keys that each new token sees
        seen = self.contexts.astype(np.int64) * new - new * (new - 1) // 2
        self.flops = 4 * int(seen.sum()) * NUM_HEADS * HEAD_DIM

    def seconds(self) -> float:
        from quire.kernels.triton import paged_attention

        params = AttentionParams(HEAD_DIM**-0.5)
        return self.card.seconds_of([partial(paged_attention, self.q, kv, self.plan, params) for kv in self.layers])

    def gathered_seconds(self) -> float:
        """torch's attention over KV gathered by the block table: sequences of one length, one new token each."""
        tables = torch.from_numpy(self.tables).to(self.card.device).long()
        length = int(self.contexts[0])
        group = NUM_HEADS // NUM_KV_HEADS
        q = self.q.view(len(tables), NUM_KV_HEADS, group, HEAD_DIM)

        def attend(k: Tensor, v: Tensor) -> Tensor:
            keys, values = (each[tables].transpose(1, 2).flatten(2, 3)[:, :, :length] for each in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, keys, values)

        return self.card.seconds_of([partial(attend, kv.keys, kv.values) for kv in self.layers])

    def flashinfer_seconds(self) -> float:
        import flashinfer

        device = self.card.device
        workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
        wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        counts = -(-self.contexts // BLOCK_SIZE)
        indices = np.concatenate([row[:count] for row, count in zip(self.tables, counts, strict=True)])
        wrapper.plan(
            torch.from_numpy(np.concatenate(([0], counts.cumsum())).astype(np.int32)).to(device),
            torch.from_numpy(indices).to(device),
            torch.from_numpy(((self.contexts - 1) % BLOCK_SIZE + 1).astype(np.int32)).to(device),
            NUM_HEADS,
            NUM_KV_HEADS,
            HEAD_DIM,
            BLOCK_SIZE,
            q_data_type=self.q.dtype,
            kv_data_type=self.layers[0].keys.dtype,
        )
        return self.card.seconds_of([partial(wrapper.run, self.q, (kv.keys, kv.values)) for kv in self.layers])


def ceilings(card: Card) -> tuple[float, float]:
    """Bytes per second that a copy reads and writes; floating-point operations per second of a bfloat16 product."""
    source = torch.zeros(CEILING_BYTES, dtype=torch.uint8, device=card.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / card.seconds_of([lambda: target.copy_(source)])
    left, right = torch.randn(2, CEILING_SIZE, CEILING_SIZE, device=card.device, dtype=torch.bfloat16)
    return copy, 2 * CEILING_SIZE**3 / card.seconds_of([lambda: left @ right])


def decode_figures(
    card: Card, copy_rate: float, batches: Sequence[tuple[int, int]], kv_dtype: torch.dtype, *, gathers: bool = False
) -> Iterator[Figure]:
    """Reading KV against copying; with `gathers` also torch's attention over gathered KV."""
    for num_seqs, context in batches:
        batch = Batch(card, [context] * num_seqs, 1, kv_dtype)
        seconds = batch.seconds()
        megabytes = batch.kv_bytes / 1e6
        name = f"decode {num_seqs} × {context}, {str(kv_dtype).removeprefix('torch.')} KV ({megabytes:.0f} MB)"
        shown = f"{seconds * 1e6:.1f} µs, {batch.kv_bytes / seconds / copy_rate:.0%} of the copy rate"
        yield Figure(name, shown, "85 %" if megabytes >= 200 else "60 %" if megabytes >= 64 else "", "100 %")
        if gathers:
            yield Figure("… against gather + SDPA", f"{batch.gathered_seconds() / seconds:.2f}×", "≥ 2.5×")


def flashinfer_figures(card: Card) -> Iterator[Figure]:
    if find_spec("flashinfer") is None:
        yield Figure("decode against FlashInfer", "not measured: flashinfer is not installed", "≥ 1.0×")
        return
    for num_seqs, context in LARGE_DECODE:
        batch = Batch(card, [context] * num_seqs, 1, torch.bfloat16)
        other = batch.flashinfer_seconds()
        name = f"decode {num_seqs} × {context} against FlashInfer ({other * 1e6:.1f} µs)"
        yield Figure(name, f"{other / batch.seconds():.2f}×", "≥ 1.0×")


def ragged_figures(card: Card) -> Iterator[Figure]:
    ragged = Batch(card, RAGGED, 1, torch.bfloat16).seconds()
    balanced = Batch(card, [sum(RAGGED) // len(RAGGED)] * len(RAGGED), 1, torch.bfloat16).seconds()
    yield Figure("ragged (32k + 63 × 512) against the balanced batch", f"{ragged / balanced:.2f}×", "≤ 1.3×")


def sharing_figures(card: Card) -> Iterator[Figure]:
    """Shared prefixes read once, against the same batch planned without sharing. Sharing must not lose 3 %."""
    for num_seqs, shared in SHARED:
        contexts = [2 * shared] * num_seqs
        batch = Batch(card, contexts, 1, torch.bfloat16, shared)
        shown = "not shared"
        if batch.plan.shared.num_programs:
            alone = Batch(card, contexts, 1, torch.bfloat16, shared, min_shared_bytes=float("inf"))
            shown = f"{alone.seconds() / batch.seconds():.2f}×"
        yield Figure(f"decode {num_seqs} × {2 * shared}, half of it shared, against not sharing", shown, "≥ 0.97×")


def prefill_figures(card: Card, matrix_rate: float) -> Iterator[Figure]:
    for length in PREFILL:
        batch = Batch(card, [length], length, torch.bfloat16)
        share = batch.flops / batch.seconds() / matrix_rate
        yield Figure(f"prefill {length}", f"{share:.0%} of the matrix rate", "≥ 50 %", "100 %")


def small_figures(card: Card, copy_rate: float) -> Iterator[Figure]:
    """The small kernels of a decode step of SMALL_TOKENS sequences, and sampling from Qwen3's vocabulary."""
    from quire.kernels import triton as kernels
    from quire.kernels.triton.sampling import SamplingRows, sample

    def empty(*shape: int) -> Tensor:
        return torch.randn(shape, device=card.device, dtype=torch.bfloat16)

    x, residual, weight = empty(SMALL_TOKENS, HIDDEN), empty(SMALL_TOKENS, HIDDEN), empty(HIDDEN)
    gates = empty(SMALL_TOKENS, 2 * INNER)
    logits = empty(SMALL_TOKENS, VOCAB)

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((SMALL_TOKENS,), value, device=card.device, dtype=dtype)

    rows = SamplingRows(
        temperature=column(0.7, torch.float32),
        top_k=column(50, torch.int32),
        top_p=column(0.9, torch.float64),
        min_p=column(0.0, torch.float32),
        keys=torch.arange(SMALL_TOKENS, device=card.device),
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
    for name, num_bytes, launch in timed:
        seconds = card.seconds_of([launch])
        shown = f"{seconds * 1e6:.1f} µs, {num_bytes / seconds / copy_rate:.0%} of the copy rate"
        yield Figure(f"{name}, {SMALL_TOKENS} rows", shown)
