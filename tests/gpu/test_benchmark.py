"""What `make bench-gpu` measures with, on a CPU and a small shape: not the figures, but the way to them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from quire import LLM

SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "torch_dtype": "float32"}


@pytest.mark.parametrize("name", list(gpu.SHAPES))
def test_rates_of_a_small_shape(name: str, tmp_path: Path) -> None:
    folder = gpu.write_shape(tmp_path, {**gpu.SHAPES[name], **SMALL, **HEADS, "vocab_size": 1000})
    llm = LLM(str(folder), device="cpu", attention_backend="sdpa", load_format="dummy", num_blocks=40, threads=1)
    assert gpu.decode_rate(llm, 3, 40, 24) > 0
    assert gpu.workload_rate(llm, 4, longest=20) > 0
    assert gpu.exposed_host_time(llm, 1.0, 3) is None


def test_one_table_of_kernels_and_models(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def empty_cache() -> None:
        pass

    monkeypatch.setattr(
        torch,
        "cuda",
        SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "a card", empty_cache=empty_cache),
    )
    monkeypatch.setattr(gpu, "kernel_figures", lambda: [gpu.Figure("copy rate", "4 TB/s")])
    monkeypatch.setattr(
        gpu, "measure_model", lambda name, folder, *, with_transformers: [gpu.Figure(f"{name} decode", "1", "2", "3")]
    )
    monkeypatch.setattr("sys.argv", ["gpu", "--skip-transformers"])
    gpu.main()
    title, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("a card, ")
    assert head == "| figure | measured | target | limit |"
    assert rows == ["| copy rate | 4 TB/s |  |  |", "| 0.6B decode | 1 | 2 | 3 |", "| 8B decode | 1 | 2 | 3 |"]


def test_without_a_device_nothing_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    gpu.main()
    assert capsys.readouterr().out == "no CUDA device: not measured\n"
