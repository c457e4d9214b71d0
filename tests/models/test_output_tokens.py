"""Output tokens get the hidden states that they get when all tokens are read; the KV of all tokens is written."""

from pathlib import Path

import pytest
import torch

from tests.checkpoints import FAMILIES, make_checkpoint
from tests.paged_model import PagedModel

TOLERANCE = 2e-5  # the last layer's sums are of the same terms, in an order that depends on the plan


@pytest.mark.parametrize("replan", [True, False], ids=["own plan", "no plan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_output_tokens_are_read(family: str, replan: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    ids = torch.randint(0, 256, (3, 60), generator=torch.Generator().manual_seed(1)).tolist()
    whole, part = PagedModel(folder), PagedModel(folder)
    before = {0: ids[0][:7], 1: ids[1][:20]}
    whole.step(before)
    part.step(before, {0: 0, 1: 1}, replan=replan)

    step = {0: ids[0][7:50], 1: ids[1][20:21], 2: ids[2][:33]}
    expected = whole.step(step)
    read = {0: 1, 1: 1, 2: 5}
    found = part.step(step, read, replan=replan)

    for sequence, count in read.items():
        assert found[sequence].shape[0] == count
        torch.testing.assert_close(found[sequence], expected[sequence][-count:], rtol=0, atol=TOLERANCE)
    after = {0: ids[0][50:51], 1: ids[1][21:22], 2: ids[2][33:34]}
    again = part.step(after)
    for sequence, logits in whole.step(after).items():
        torch.testing.assert_close(again[sequence], logits, rtol=0, atol=TOLERANCE)
