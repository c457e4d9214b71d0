"""Logits of Llama and its relatives equal those of transformers, however the work is cut into steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quire.kernels import reference
from quire.model_config import ModelConfig
from tests.checkpoints import FAMILIES, make_checkpoint, reference_model
from tests.models.parity import TOLERANCE, assert_close, assert_equals_transformers, expected_logits, prompt
from tests.paged_model import PagedModel

DECODERS = [family for family in FAMILIES if family != "gpt2"]


@pytest.mark.parametrize("family", DECODERS)
def test_prefill_chunks_and_decode_match_transformers(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    ids = prompt(90)
    expected = expected_logits(folder, ids)
    model = PagedModel(folder)

    whole = model.step({0: ids})[0]
    chunks = [model.step({1: ids[begin:end]})[1] for begin, end in ((0, 33), (33, 34), (34, 80))]
    # A decode step of one sequence, beside a prefill of another.
    for position in range(80, 90):
        mixed = model.step({1: ids[position : position + 1], 2: ids[(position - 80) * 9 : (position - 79) * 9]})
        chunks.append(mixed[1])
        assert_close(mixed[2], expected[(position - 80) * 9 : (position - 79) * 9])

    assert_close(whole, expected)
    assert_close(torch.cat(chunks), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_reference_kernels_compute_the_same(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    ids = prompt(40)
    model = PagedModel(folder, kernels=reference, block_size=8)
    assert_close(torch.cat([model.step({0: ids[:30]})[0], model.step({0: ids[30:]})[0]]), expected_logits(folder, ids))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"hidden_act": "quick_gelu"}),
        ("llama", {"hidden_act": "mish"}),
        ("llama", {"hidden_act": "tanh"}),
        ("llama", {"hidden_act": "sigmoid"}),
        ("llama", {"hidden_act": "linear"}),
        (
            "llama",
            {"hidden_size": 60, "intermediate_size": 101, "head_dim": 20, "num_attention_heads": 5}
            | {"num_key_value_heads": 1},
        ),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 1}),
        ("qwen3", {"tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_options_match_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(make_checkpoint(tmp_path, family, **overrides))


@pytest.mark.usefixtures("float_products")
@pytest.mark.parametrize("checkpoint_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_16_bit_checkpoints(checkpoint_dtype: str, dtype: str, tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", dtype=checkpoint_dtype, tie_word_embeddings=tied)
    ids = prompt(40)
    # A second rounding of the weights shows; without one, only float32 rounding does.
    tolerance = TOLERANCE if dtype in ("float32", checkpoint_dtype) else 1e-1
    assert_close(PagedModel(folder, dtype).step({0: ids})[0], expected_logits(folder, ids), tolerance)


def test_shards_hold_the_same_model(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", "llama")
    shards = make_checkpoint(tmp_path / "shards", "llama", max_shard_size="200KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    ids = prompt(20)
    assert torch.equal(PagedModel(shards).step({0: ids})[0], PagedModel(whole).step({0: ids})[0])


def test_dynamic_rope_beyond_its_length_matches_transformers_token_by_token(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama-rope-dynamic", max_position_embeddings=32)
    assert ModelConfig.from_folder(folder).context_length == 128
    ids = prompt(100)
    model, oracle = PagedModel(folder), reference_model(folder)
    with torch.inference_mode():
        out = oracle(torch.tensor([ids[:20]]), use_cache=True)
        expected = [out.logits[0]]
        for token in ids[20:]:
            out = oracle(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            expected.append(out.logits[0])
    # Quire's rotation does not depend on how the prompt is cut.
    assert_close(torch.cat([model.step({0: ids[:64]})[0], model.step({0: ids[64:]})[0]]), torch.cat(expected))
