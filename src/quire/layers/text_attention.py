"""TextAttention: attention of whole texts with a bias for each head and distance; nothing is cached.

Encoders whose attention knows positions by distance alone (MPNet, JinaBERT) use it. A text is computed in one step, so
the step's own keys are all keys. The paged kernels have no such bias.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from quire.kernels import Kernels
from quire.layers.attention import Attention
from quire.layers.step_context import StepContext

_MAX_SCORES = 2**24
"""Scores that are held at once."""


class TextAttention(Attention):
    """Satisfies what `SelfAttention` asks of `Attention`."""

    __slots__ = ("biases",)

    def __init__(self, kernels: Kernels, layer: int, *, scale: float, biases: Tensor) -> None:
        """`biases` [num_heads, 2 * longest - 1] float32: for keys `longest` - 1 before a query to as many after it."""
        super().__init__(kernels, layer, scale=scale)
        self.biases = biases

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: StepContext) -> Tensor:
        """As `Attention`."""
        assert context.text_starts is not None, "only whole texts are computed"
        out = q.new_empty(q.shape)
        for begin, end in zip(context.text_starts[:-1], context.text_starts[1:], strict=True):
            heads = [part[begin:end].transpose(0, 1)[None] for part in (q, k, v)]
            self._attend(heads, out[begin:end])
        return context.select_output(out)

    def _attend(self, heads: Sequence[Tensor], out: Tensor) -> None:
        """Queries, keys and values [1, num_heads, L, D] of one text -> out [L, num_heads, D]."""
        q, k, v = heads
        _, num_heads, length, _ = q.shape
        longest = (self.biases.shape[1] + 1) // 2
        most = max(1, _MAX_SCORES // (num_heads * length))
        for first in range(0, length, most):
            last = min(first + most, length)
            # Row r of the windows begins at distance -(last - 1) + r, which is that of query last - 1 - r and key 0.
            distances = self.biases[:, longest - last : longest - first + length - 1]
            bias = distances.unfold(1, length, 1).flip(1).to(q.dtype)
            attended = functional.scaled_dot_product_attention(
                q[:, :, first:last], k, v, attn_mask=bias[None], scale=self.params.scale
            )
            out[first:last] = attended[0].transpose(0, 1)
