"""The layer writes before it reads, and passes its own scale, window and soft-cap on."""

import numpy as np
import torch
from torch import Tensor

from quire.attention import AttentionShape, StepArrays
from quire.attention.plan import plan_attention
from quire.kernels import KVLayer, reference
from quire.layers.attention import Attention
from quire.layers.step_context import StepContext


def attend(layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All tokens of one sequence, in a cache of two blocks."""
    n, kv_heads, head_dim = k.shape
    step = StepArrays(
        np.array([0, n], dtype=np.int32),
        np.array([n], dtype=np.int32),
        np.array([[1, 0]], dtype=np.int32),
        np.array([8 + i if i < 8 else i - 8 for i in range(n)], dtype=np.int32),
    )
    shape = AttentionShape(num_heads=q.shape[1], num_kv_heads=kv_heads, head_dim=head_dim, block_size=8)
    plan = plan_attention(step, shape)
    kv = KVLayer(torch.zeros(2, kv_heads, head_dim, 8), torch.zeros(2, kv_heads, 8, head_dim))
    return layer(q, k, v, StepContext(torch.arange(n, dtype=torch.int32), [kv], [plan]))


def test_equals_dense_attention() -> None:
    q, k, v = torch.randn(11, 4, 16), torch.randn(11, 2, 16), torch.randn(11, 2, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(attend(Attention(reference, 0, scale=0.3), q, k, v), expected[0].transpose(0, 1))


def test_window_of_one_sees_only_itself() -> None:
    q, k, v = torch.randn(11, 2, 16), torch.randn(11, 2, 16), torch.randn(11, 2, 16)
    torch.testing.assert_close(attend(Attention(reference, 0, scale=1.0, window=1), q, k, v), v)


def test_softcap_bounds_scores() -> None:
    q, k, v = torch.randn(11, 2, 16) * 100, torch.randn(11, 2, 16) * 100, torch.randn(11, 2, 16)
    capped = attend(Attention(reference, 0, scale=1.0, softcap=1e-4), q, k, v)
    # Scores within ±1e-4: nearly the mean of what is visible.
    torch.testing.assert_close(capped[-1], v.mean(0), atol=1e-3, rtol=1e-3)
