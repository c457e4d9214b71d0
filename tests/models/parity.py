"""Logits of a checkpoint as transformers computes them, and what is compared with them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoints import reference_model
from tests.paged_model import PagedModel

TOLERANCE = 2e-4


def prompt(length: int, seed: int = 1) -> list[int]:
    ids: list[int] = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def expected_logits(folder: Path, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = reference_model(folder)(torch.tensor([ids])).logits[0]
    return logits


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert (found - expected).abs().max().item() <= tolerance


def largest_difference(folder: Path, **options: Any) -> float:
    """The largest difference of a logit: of a prompt in two pieces and one token after it here, of all at once in
    transformers."""
    ids = prompt(50)
    model = PagedModel(folder, **options)
    steps = [ids[:37], ids[37:49], ids[49:]]
    found = torch.cat([model.step({0: step})[0] for step in steps])
    return (found - expected_logits(folder, ids)).abs().max().item()


def assert_equals_transformers(folder: Path, **options: Any) -> None:
    assert largest_difference(folder, **options) <= TOLERANCE
