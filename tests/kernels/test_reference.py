"""The specification against what others say: torch's own operations, on sequences that are not paged."""

import pytest
import torch
from torch.nn import functional

from quire.kernels import KVLayer, reference
from tests.kernels.ragged_batch import Shape, ragged_batch


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("window", [0, 5])
def test_paged_attention_is_causal_attention_of_each_sequence(block_size: int, window: int) -> None:
    shape = Shape(num_heads=4, num_kv_heads=2, head_dim=32, block_size=block_size)
    sequences = [(20, 20), (33, 5), (16, 1)]
    batch = ragged_batch(sequences, shape)
    found = reference.paged_attention(*batch.inputs(window=window))
    row = 0
    for s, (length, new) in enumerate(sequences):
        position = torch.arange(length)
        block, offset = batch.plan.block_tables[s, position // block_size].long(), position % block_size
        key = batch.kv.keys[block, :, :, offset].transpose(0, 1)  # [kv heads, keys, D]
        value = batch.kv.values[block, :, offset].transpose(0, 1)
        seen = position <= position[length - new :, None]
        if window:
            seen &= position > position[length - new :, None] - window
        expected = functional.scaled_dot_product_attention(
            batch.q[row : row + new].transpose(0, 1), key, value, attn_mask=seen, enable_gqa=True
        )
        torch.testing.assert_close(found[row : row + new], expected.transpose(0, 1))
        row += new


def test_softcap_and_alibi_by_hand() -> None:
    """Two keys, one query at position 1: the older key is one position away."""
    shape = Shape(num_heads=1, num_kv_heads=1, head_dim=8, block_size=2)
    batch = ragged_batch([(2, 1)], shape)
    block = batch.plan.block_tables[0, 0]
    scores = (batch.kv.keys[block, 0].T @ batch.q[0, 0]) * batch.scale
    expected = (1.5 * torch.tanh(scores / 1.5) + torch.tensor([-0.25, 0.0])).softmax(0) @ batch.kv.values[block, 0]
    slopes = torch.tensor([0.25])
    found = reference.paged_attention(*batch.inputs(softcap=1.5, alibi_slopes=slopes))
    torch.testing.assert_close(found[0, 0], expected)


def test_rms_norm_is_torchs() -> None:
    x, residual, weight = torch.randn(3, 48), torch.randn(3, 48), torch.rand(48)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), functional.rms_norm(x, (48,), weight, 1e-5))
    total = x + residual
    found = reference.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(found, functional.rms_norm(total, (48,), weight, 1e-5))
    torch.testing.assert_close(residual, total)


def test_rotary_turns_pairs_by_their_angle() -> None:
    q, k = torch.randn(3, 2, 10, dtype=torch.float64), torch.randn(3, 1, 10, dtype=torch.float64)
    before = q.clone()
    angles = torch.rand(7, 3, dtype=torch.float64)
    positions = torch.tensor([6, 0, 2], dtype=torch.int32)
    reference.rotary_(q, k, positions, torch.cat((angles.cos(), angles.sin()), dim=1))
    turn = torch.polar(torch.ones(3, 3, dtype=torch.float64), angles[positions.long()]).unsqueeze(1)
    expected = torch.complex(before[..., :3], before[..., 3:6]) * turn
    torch.testing.assert_close(q, torch.cat((expected.real, expected.imag, before[..., 6:]), dim=-1))


def test_written_blocks_can_be_copied() -> None:
    kv = KVLayer(torch.zeros(4, 2, 8, 4), torch.zeros(4, 2, 4, 8))
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    reference.write_kv(k, v, kv, torch.tensor([5, -1, 7], dtype=torch.int32))
    assert torch.equal(kv.keys[1, :, :, 1], k[0])
    assert torch.equal(kv.values[1, :, 3], v[2])
    assert torch.count_nonzero(kv.keys) == torch.count_nonzero(kv.values) == 32
    reference.copy_blocks([kv], torch.tensor([[1, 3]], dtype=torch.int32))
    assert torch.equal(kv.keys[3], kv.keys[1])
    assert torch.equal(kv.values[3], kv.values[1])
