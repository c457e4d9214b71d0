"""Tables of cosines and sines equal those of transformers, for every type of scaling."""

from typing import Any

import pytest
import torch
from transformers.models.llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quire.kernels import reference
from quire.layers.rotary import cos_sin_table, half_layout
from quire.model_config import RopeConfig

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(
    ("rope_type", "values"),
    [
        ("default", {}),
        ("linear", {"factor": 8.0}),
        ("dynamic", {"factor": 4.0}),
        ("llama3", {"factor": 8.0, "original_max_position_embeddings": 512, **LLAMA3}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 1024}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 1.5}),
        (
            "yarn",
            {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0},
        ),
        (
            "yarn",
            {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.3},
        ),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}),
    ],
    ids=str,
)
def test_tables_equal_those_of_transformers(rope_type: str, values: dict[str, Any], theta: float) -> None:
    length, head_dim = 4096, 64
    parameters = {"rope_type": rope_type, "rope_theta": theta, **values}
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=length,
        rope_parameters=parameters,
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    expected = torch.cat((cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]), dim=1)

    values = dict(values)
    original = values.pop("original_max_position_embeddings", length)
    rope = RopeConfig(theta=theta, rope_type=rope_type, original_max_position=original, **values)
    # Angles of thousands of radians carry float32's rounding of the product.
    torch.testing.assert_close(cos_sin_table(rope, head_dim, length), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(cos_sin_table(rope, head_dim, 128), expected[:128], rtol=0, atol=2e-5)


def test_dynamic_frequencies_belong_to_the_position_not_to_the_length() -> None:
    rope = RopeConfig(rope_type="dynamic", factor=2.0, original_max_position=32)
    table = cos_sin_table(rope, 16, 64)
    torch.testing.assert_close(table[:48], cos_sin_table(rope, 16, 48), rtol=0, atol=1e-6)
    torch.testing.assert_close(table[:32], cos_sin_table(RopeConfig(), 16, 32))
    assert not torch.allclose(table[32:], cos_sin_table(RopeConfig(), 16, 64)[32:], atol=1e-3)


def test_only_a_part_of_each_head_is_rotated() -> None:
    cos_sin = cos_sin_table(RopeConfig(partial_rotary_factor=0.5), 16, 10)
    assert cos_sin.shape == (10, 8)
    q, k = torch.randn(3, 2, 16), torch.randn(3, 1, 16)
    before = q.clone()
    reference.rotary_(q, k, torch.tensor([0, 5, 9], dtype=torch.int32), cos_sin)
    assert torch.equal(q[..., 8:], before[..., 8:])
    assert torch.equal(q[0], before[0])
    assert not torch.equal(q[1], before[1])


@pytest.mark.parametrize("rotary_dim", [16, 12, 4])
def test_interleaved_pairs_are_rotated_in_another_order_of_elements(rotary_dim: int) -> None:
    """Scores of heads whose elements 2 i and 2 i + 1 turn together, by complex multiplication."""
    head_dim, positions = 16, torch.tensor([0, 5, 9], dtype=torch.int32)
    table = cos_sin_table(RopeConfig(partial_rotary_factor=rotary_dim / head_dim), head_dim, 10)
    q, k = torch.randn(3, 2, head_dim), torch.randn(3, 2, head_dim)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        cos, sin = table[positions.long(), None].chunk(2, dim=-1)
        pairs = torch.view_as_complex(x[..., :rotary_dim].unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
        return torch.cat((turned, x[..., rotary_dim:]), dim=-1)

    expected = torch.einsum("shd,thd->hst", rotated(q), rotated(k))
    order = half_layout(head_dim, rotary_dim, torch.device("cpu"))
    q, k = q[..., order], k[..., order]
    reference.rotary_(q, k, positions, table)
    torch.testing.assert_close(torch.einsum("shd,thd->hst", q, k), expected)
