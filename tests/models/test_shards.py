"""A model that ranks hold together computes what one process computes, in every family that can be divided."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.coded import CodedMatrix
from quire.layers.linear import LinearWeight, Matrix
from quire.layers.ranks import Ranks
from quire.model_config import ModelConfig
from quire.model_config.divided import divide, kv_copies
from quire.models.shards import Shards
from tests.checkpoints import make_checkpoint
from tests.paged_model import PagedModel

CPU = torch.device("cpu")
PROMPT = [7, 3, 91, 12, 250, 7, 64, 18, 33, 5, 200, 141, 9, 77, 2, 40, 111]
KINDS = (
    *("llama-bias", "gpt2", "mixtral", "qwen2-moe", "gemma2", "deepseek-v3", "falcon-new", "bloom", "gpt-bigcode"),
)
"""Every way of dividing a layer."""


def run_together(size: int, work: Callable[[Ranks], Tensor], folder: Path) -> list[Tensor]:
    """What `work` returns on every rank. Ranks are threads here; in earnest they are processes."""
    found: dict[int, Tensor | BaseException] = {}

    def run(rank: int) -> None:
        try:
            ranks = Ranks(rank, size)
            ranks.connect(folder / f"meeting-{size}", CPU)
            found[rank] = work(ranks)
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [each for each in found.values() if isinstance(each, BaseException)]
    if errors:
        raise errors[0]
    return [each for _, each in sorted(found.items()) if isinstance(each, Tensor)]


def logits_of(model: PagedModel) -> Tensor:
    """Logits of a prompt in two pieces beside another sequence, then of one token."""
    first = model.step({0: PROMPT[:9], 1: PROMPT[3:8]})
    second = model.step({0: PROMPT[9:]})
    third = model.step({0: [5], 1: [6]})
    return torch.cat([first[0], first[1], second[0], third[0], third[1]])


def divided_logits(folder: Path, size: int, scratch: Path, dtype: str = "float32") -> list[Tensor]:
    model_config = ModelConfig.from_folder(folder)

    def work(ranks: Ranks) -> Tensor:
        with torch.inference_mode():
            part = divide(model_config, size, ranks.rank)
            shards = Shards(ranks, kv_copies(model_config, size), model_config.vocab_size)
            return logits_of(PagedModel(folder, dtype, config=part, shards=shards))

    return run_together(size, work, scratch)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_compute_the_logits_of_one(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", kind)
    whole = logits_of(PagedModel(folder))
    first, second = divided_logits(folder, 2, tmp_path)
    assert torch.equal(first, second), "every rank has the same bits"
    assert first.shape == whole.shape
    torch.testing.assert_close(first, whole, rtol=2e-4, atol=2e-4)
    assert torch.equal(first.argmax(1), whole.argmax(1))


@pytest.mark.parametrize(("kind", "size"), [("llama", 4), ("phi3", 4)])
def test_ranks_share_kv_heads_where_there_are_fewer(kind: str, size: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", kind)
    whole = logits_of(PagedModel(folder))
    for part in divided_logits(folder, size, tmp_path):
        torch.testing.assert_close(part, whole, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_layers_are_divided(dtype: str, tmp_path: Path) -> None:
    """A row's offsets of int4 have a unit of their own, so a part of it is rounded in another way, not worse."""
    folder = make_checkpoint(tmp_path / "model", "mixtral", intermediate_size=128)
    floats, whole = logits_of(PagedModel(folder)), logits_of(PagedModel(folder, dtype))
    first, second = divided_logits(folder, 2, tmp_path, dtype)
    assert torch.equal(first, second)
    if dtype == "int8":
        torch.testing.assert_close(first, whole, rtol=2e-3, atol=2e-3)
    assert (first - floats).norm() < 1.2 * (whole - floats).norm()


@pytest.mark.parametrize(
    ("kind", "size", "reason"),
    [
        ("llama", 3, "which does not divide the model's attention heads, 4"),
        ("qwen3.5", 2, "has recurrent layers, which Quire cannot divide"),
        ("olmo2", 2, "has one norm for the queries of all heads"),
        ("gpt-oss", 2, "has experts whose gates and inputs take turns"),
        ("cohere", 2, "a norm with weights for every head"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(kind: str, size: int, reason: str, tmp_path: Path) -> None:
    overrides = {"use_qk_norm": True} if kind == "cohere" else {}
    folder = make_checkpoint(tmp_path, kind, **overrides)
    with pytest.raises(ConfigError, match=f"tensor_parallel_size is {size}.*{reason}"):
        divide(ModelConfig.from_folder(folder), size)


def coded(group_size: int) -> CodedMatrix:
    generator = torch.Generator().manual_seed(1)
    groups = -(-128 // group_size)
    return CodedMatrix(
        torch.randint(0, 16, (24, 128), generator=generator, dtype=torch.uint8),
        torch.rand(24, groups, generator=generator) + 0.1,
        group_size,
        tuple(float(level) for level in range(16)),
        zeros=torch.randint(0, 16, (24, groups), generator=generator).float(),
    )


def in_blocks(type_name: str) -> BlockMatrix:
    values = np.random.default_rng(2).standard_normal((24, 512)).astype(np.float32)
    kind = getattr(gguf.GGMLQuantizationType, type_name)
    return BlockMatrix(torch.from_numpy(gguf.quantize(values, kind)), type_name)


@pytest.mark.parametrize(
    ("matrix", "keeps_bits"),
    [
        (coded(32), True),
        (coded(128), True),
        (coded(96), False),
        (replace(coded(32), order=torch.arange(128).flip(0)), False),
        (in_blocks("Q8_0"), True),
        (in_blocks("Q4_0"), True),
        (torch.arange(96.0).view(8, 12), True),
    ],
)
def test_parts_of_stored_matrices(matrix: Matrix, keeps_bits: bool) -> None:
    """Bits are kept where a part ends with its groups; the numbers are the same everywhere."""
    whole = LinearWeight(matrix, torch.arange(float(matrix.shape[0])))
    num_outputs, num_inputs = (size // 2 for size in matrix.shape)
    for rank in range(2):
        shards = Shards(Ranks(rank, 2), 1, 100)
        rows = slice(rank * num_outputs, (rank + 1) * num_outputs)
        part = shards.take(lambda shape: whole, (num_outputs, 2 * num_inputs), (("outputs", num_outputs),))
        assert torch.equal(part.floats(), whole.floats()[rows])
        assert part.bias is not None
        assert whole.bias is not None
        assert torch.equal(part.bias, whole.bias[rows])
        assert type(part.weight) is type(matrix)
        columns = slice(rank * num_inputs, (rank + 1) * num_inputs)
        part = shards.take(lambda shape: whole, (2 * num_outputs, num_inputs), (("inputs", 2 * num_outputs),))
        assert torch.equal(part.floats(), whole.floats()[:, columns])
        assert (part.bias is None) == (rank > 0), "the sum has the bias once"
        assert (type(part.weight) is type(matrix)) == keeps_bits


def test_a_part_is_counted_as_it_is_held(tmp_path: Path) -> None:
    whole = ModelConfig.from_folder(make_checkpoint(tmp_path, "llama"))
    part = divide(whole, 2)
    assert part.spec.kv_bytes_per_token("float32") == whole.spec.kv_bytes_per_token("float32") // 2
    norms = whole.spec.num_vector_parameters * 4
    assert part.spec.weight_bytes("float32") - norms == pytest.approx(
        (whole.spec.weight_bytes("float32") - norms) / 2, rel=0.01
    )
    assert divide(whole, 1) is whole
    assert divide(whole, 4).spec.kv_bytes_per_token("float32") == part.spec.kv_bytes_per_token("float32")
