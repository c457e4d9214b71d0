"""`make bench-gpu` from its first row to its last without a card: every row that is promised comes, with its target and
limit, and nothing fails but what could only fail on a card."""

import importlib.machinery
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.gpu_table import Table, measure_all
from tests.gpu.rehearsal import NoCard, make_small, pretend

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a card, make bench-gpu is no rehearsal"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.filterwarnings(
        "ignore:(overflow|invalid value|divide by zero|All-NaN slice) encountered:RuntimeWarning"
    ),
]

PROMISED = {
    "copy rate": ("", ""),
    "decode 2 × 70, bfloat16 KV (0 MB)": ("", "100 %"),
    "… against gather + SDPA": ("≥ 2.5×", ""),
    "decode 2 × 70 against FlashInfer (1000000.0 µs)": ("≥ 1.0×", ""),
    "sampling, greedy, 2 rows": ("", ""),
    "decode 2 × 70, float8_e4m3fn KV (0 MB)": ("", "100 %"),
    "ragged (32k + 63 × 512) against the balanced batch": ("≤ 1.3×", ""),
    "prefill 40": ("≥ 50 %", "100 %"),
    "decode 8 × 64, half of it shared, against not sharing": ("≥ 0.97×", ""),
    "0.6B decode, batch 1, 1k context": ("1,600", "3,284"),
    "0.6B decode, batch 4, 1k context": ("23,000", "35,200"),
    "8B decode, batch 1, 1k context": ("215", "284"),
    "8B decode, batch 4, 1k context": ("15,000", "22,300"),
    "0.6B nano-vllm's workload, 3 × 3–5 in and out": ("20,000", "36,100"),
    "8B nano-vllm's workload, 3 × 3–5 in and out": ("9,500", "14,100"),
    **{f"{name} exposed host time a step, batch 4": ("≤ 0.2 ms", "0") for name in gpu.SHAPES},
    **{f"{name} 2 × 4 + 2 against transformers' generate": ("≥ 10×", "") for name in gpu.SHAPES},
    **{f"{name} 2 × 4 + 2 against transformers' generate_batch": ("≥ 3×", "") for name in gpu.SHAPES},
}


class DecodeWrapper:
    """Takes what FlashInfer 0.6.18's takes."""

    def __init__(self, workspace: Tensor, kv_layout: str, *, use_tensor_cores: bool) -> None:
        assert kv_layout == "HND"

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, page_size: int, *, q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert int(indptr[-1]) == len(indices)
        assert 0 < int(last_page_len.min()) <= int(last_page_len.max()) <= page_size

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        return q


def test_every_row_comes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flashinfer: Any = ModuleType("flashinfer")
    flashinfer.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = DecodeWrapper
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    pretend(monkeypatch)
    make_small(monkeypatch)
    card, file = NoCard(), tmp_path / "results" / "table.md"
    measure_all(gpu.measurements(card, tmp_path), Table(card.name, file), 1e9, clean_up=card.clean_up)
    title, _, head, _, *lines = file.read_text().splitlines()
    assert "nothing is measured" in title
    assert head == "| figure | measured | target | limit |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = {what: (measured, (target, limit)) for what, measured, target, limit in cells}
    assert {what: promised for what, (_, promised) in rows.items() if what in PROMISED} == PROMISED
    broken = [what for what, (measured, _) in rows.items() if re.search("failed|not |no graph", measured)]
    assert broken == []
