"""The table of proposers: every row drafts, and another row needs nothing else."""

import pytest

from quire import speculative_config
from quire.scheduler.acceptance import Draft
from quire.scheduler.draft_planner import DraftPlanner
from quire.scheduler.proposers import PROPOSERS
from quire.speculative_config import SpeculativeConfig


def test_every_method_of_the_config_has_a_row() -> None:
    assert tuple(PROPOSERS) == speculative_config.SPECULATIVE_METHODS


@pytest.mark.parametrize("method", PROPOSERS)
def test_no_row_drafts_more_than_is_asked_for(method: str) -> None:
    proposer, token_ids = PROPOSERS[method](SpeculativeConfig(method=method)), [1, 2, 3] * 5
    for max_tokens in (1, 2, 9, 1):
        assert len(proposer.propose(token_ids, max_tokens).token_ids) <= max_tokens
        token_ids.append(len(token_ids) % 3 + 1)


def test_drafts_of_a_kind_are_expected_to_fare_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kind of the toy's drafts is always right, the other never."""

    class CountsUp:
        def propose(self, token_ids: list[int], max_tokens: int) -> Draft:
            last = token_ids[-1]
            return Draft([last + 1, last + 2], kind=1) if last % 2 else Draft([0, 0], kind=2)

    monkeypatch.setitem(PROPOSERS, "counts up", lambda config: CountsUp())
    monkeypatch.setattr(speculative_config, "SPECULATIVE_METHODS", ("counts up",))
    planner = DraftPlanner(SpeculativeConfig(method="counts up"))
    for _ in range(9):
        planner.times.measure(1, 1.0, 0.0)
    drafts, token_ids = planner.new_drafts(), [0]
    for _ in range(40):
        chosen = planner.choose([(drafts, token_ids, 9)], 1, 9, 0.0)
        token_ids.append(token_ids[-1] + 1)
    assert token_ids[-2] % 2 == 1
    assert chosen == [[token_ids[-1], token_ids[-1] + 1]], "the kind that is right is computed"
    assert planner.choose([(drafts, token_ids, 9)], 1, 9, 0.0) == [[]], "the kind that is wrong is not"
