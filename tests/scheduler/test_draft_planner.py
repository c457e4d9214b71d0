"""Drafts are taken if they promise more tokens per second by the times of the last steps."""

from collections.abc import Callable

from quire.scheduler.draft_planner import Candidate, DraftPlanner
from quire.speculative_config import SpeculativeConfig

LOOP = [1, 2, 3, 4, 5, 6, 7] * 3
RANDOM = list(range(100, 150))
MEMORY_BOUND: Callable[[int], float] = lambda num_tokens: 0.01 + 0.0003 * num_tokens  # noqa: E731
COMPUTE_BOUND: Callable[[int], float] = lambda num_tokens: 0.0001 + 0.001 * num_tokens  # noqa: E731


def taught() -> DraftPlanner:
    """One that has seen drafts of a loop hold."""
    planner, token_ids = DraftPlanner(SpeculativeConfig()), LOOP.copy()
    drafts = planner.new_drafts()
    for _ in range(8):
        drafts.propose(token_ids, 16)
        token_ids.append(token_ids[-7])
    return planner


class Sequence:
    """Tokens and their drafts, as the scheduler has them."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = list(token_ids)
        self.drafts = taught().new_drafts()

    def candidate(self, most: int = 100) -> Candidate:
        return self.drafts, self.token_ids, most


def run(seconds: Callable[[int], float], sequences: list[Sequence], next_token: Callable[[Sequence], int]) -> list[int]:
    """Fifty steps of all sequences; returns how many tokens each step drafted."""
    planner, now, drafted = DraftPlanner(SpeculativeConfig()), 0.0, []
    for sequence in sequences:
        sequence.drafts = planner.new_drafts()
    for _ in range(50):
        candidates = [sequence.candidate() for sequence in sequences]
        drafts = planner.choose(candidates, len(sequences), 64, now)
        num_tokens = len(sequences) + sum(map(len, drafts))
        now += seconds(num_tokens)
        planner.times.measure(num_tokens, seconds(num_tokens), now, drafted=any(drafts))
        drafted.append(num_tokens - len(sequences))
        for sequence, draft in zip(sequences, drafts, strict=True):
            for expected in [*draft, -1]:
                token = next_token(sequence)
                sequence.token_ids.append(token)
                if token != expected:
                    break
    return drafted


def next_in_loop(sequence: Sequence) -> int:
    return sequence.token_ids[-1] % 7 + 1


def never_as_before(sequence: Sequence) -> int:
    """After a token that stood there before comes another one than each time."""
    last = sequence.token_ids[-1]
    return (last + sequence.token_ids.count(last)) % 50


def test_a_loop_gets_the_longest_drafts_once_a_plain_step_is_known() -> None:
    drafted = run(MEMORY_BOUND, [Sequence(LOOP)], next_in_loop)
    assert drafted[:3] == [0, 0, 0]
    assert drafted[3:] == sorted(drafted[3:])
    assert set(drafted[9:]) == {16}


def test_a_batch_that_fills_the_machine_gets_none() -> None:
    """But for the steps in which it is found out."""
    drafted = run(COMPUTE_BOUND, [Sequence(LOOP) for _ in range(8)], next_in_loop)
    assert sum(num > 0 for num in drafted) <= 2


def test_a_text_that_repeats_nothing_gets_none() -> None:
    assert not any(run(MEMORY_BOUND, [Sequence([0])], never_as_before))


def test_where_repetition_ends_so_do_drafts() -> None:
    drafted = run(
        MEMORY_BOUND, [Sequence(LOOP)], lambda s: next_in_loop(s) if len(s.token_ids) < 60 else never_as_before(s)
    )
    assert max(drafted) == 16
    assert not any(drafted[-30:])


def test_drafts_are_expected_to_fare_as_those_after_runs_as_long() -> None:
    planner = DraftPlanner(SpeculativeConfig())
    drafts = planner.new_drafts()
    token_ids = [*range(20), *range(8)]
    for token in range(8, 18):
        assert drafts.propose(token_ids, 3)[:2] == [token, token + 1]
        token_ids.append(token)
    after_long_runs = drafts.acceptance
    assert after_long_runs.probability > 0.5
    token_ids.append(3)
    assert drafts.propose(token_ids, 2) == [4, 5]
    assert drafts.acceptance is not after_long_runs
    assert drafts.acceptance.probability == 0


def test_a_sequence_begins_with_what_others_have_shown_and_goes_by_its_own() -> None:
    planner = DraftPlanner(SpeculativeConfig())
    assert planner.new_drafts().acceptance.probability == 0
    for _ in range(100):
        planner.new_drafts().acceptance.judge([1] * 16, [1] * 16)
    own, other = planner.new_drafts().acceptance, planner.new_drafts().acceptance
    assert 0.7 < own.probability < 1
    for _ in range(8):
        own.judge([1] * 16, [2])
    assert own.probability < 0.3
    assert other.probability > 0.7
    for _ in range(3):
        own.judge([1] * 16, [1] * 16)
    assert own.probability > 0.8


def test_where_no_draft_is_worth_taking_few_are_looked_for() -> None:
    planner, sequence = DraftPlanner(SpeculativeConfig()), Sequence(LOOP)
    steps = [(planner.begin_step(), planner.pauses, planner.measures) for _ in range(112)]
    assert steps[:32] == [(True, False, True)] * 32
    looks, _, measures = zip(*steps[32:], strict=True)
    assert all(pauses for _, pauses, _ in steps[32:])
    assert [place for place, looked in enumerate(looks) if looked] == [15, 31, 47, 63, 79]
    # As many steps are measured just before as must have been seen lately.
    assert [place for place, measured in enumerate(measures) if measured] == [
        place for end in (15, 31, 47, 63, 79) for place in range(end - 3, end)
    ]
    for _ in range(3):
        planner.times.measure(1, 1.0, 0.0)
    assert planner.choose([sequence.candidate()], 1, 64, 0.0) != [[]]
    assert planner.begin_step()


def test_of_two_sequences_the_one_that_repeats_is_drafted() -> None:
    loop, other = Sequence(LOOP), Sequence(RANDOM)
    drafted = run(MEMORY_BOUND, [loop, other], lambda s: next_in_loop(s) if s is loop else 1000 + len(s.token_ids))
    assert set(drafted[12:]) == {16}


def test_a_request_that_may_have_no_more_gets_no_draft() -> None:
    planner = DraftPlanner(SpeculativeConfig())
    for _ in range(3):
        planner.times.measure(1, 1.0, 0.0)
    sequence = Sequence(LOOP)
    assert planner.choose([sequence.candidate(most=0)], 1, 64, 0.0) == [[]]
    assert planner.choose([sequence.candidate(most=-1)], 1, 64, 0.0) == [[]]
    assert planner.choose([sequence.candidate(most=2)], 1, 64, 0.0) == [[1, 2]]
    assert planner.choose([sequence.candidate()], 1, 3, 0.0) == [[1, 2, 3]]
    assert planner.choose([sequence.candidate()], 1, -5, 0.0) == [[]]


def test_old_times_are_not_believed() -> None:
    planner, sequence = DraftPlanner(SpeculativeConfig()), Sequence(LOOP)
    for _ in range(3):
        planner.times.measure(1, 1.0, 0.0)
    assert planner.choose([sequence.candidate()], 1, 64, 29.0) != [[]]
    assert planner.choose([sequence.candidate()], 1, 64, 31.0) == [[]]
