"""Inner layers compute every token; the last layer, and what is chosen after it, only the output tokens."""

from typing import Any

import torch

from quire.kernels import OutputTokens
from quire.layers.step_context import StepContext

PLAN: Any = None


def test_all_tokens_are_read() -> None:
    context = StepContext(torch.arange(4, dtype=torch.int32), [], [PLAN])
    x = torch.randn(4, 3)
    assert context.for_inner_layers is context
    assert context.select_output(x) is x


def test_some_tokens_are_read() -> None:
    rows = torch.tensor([1, 3], dtype=torch.int32)
    context = StepContext(torch.arange(4, dtype=torch.int32), [], [PLAN], OutputTokens(rows, None))
    x = torch.randn(4, 3)
    assert torch.equal(context.select_output(x), x[[1, 3]])
    assert context.for_inner_layers.select_output(x) is x
    assert context.for_inner_layers.positions is context.positions
