"""Logits processors in the sampler: what they are given, in which order they act, and who pays for one that raises."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.kernels import cpu
from quire.sampling import Sampler, SampleResult, SamplingState
from quire.sampling.logits_processors import RowView, load_processors
from quire.sampling_params import SamplingParams

VOCAB_SIZE = 40
GREEDY = SamplingParams(temperature=0.0)


class Banner:
    """Bans the token named in the request's label `ban`; as far as it goes, vectorised."""

    def wants(self, params: SamplingParams) -> bool:
        return "ban" in params.extra

    def apply(self, logits: Tensor, rows: Sequence[RowView]) -> Tensor:
        logits[torch.arange(len(rows)), torch.tensor([int(row.params.extra["ban"]) for row in rows])] = -torch.inf
        return logits


class Faulty(Banner):
    """Spoils what it was given, then raises."""

    def apply(self, logits: Tensor, rows: Sequence[RowView]) -> Tensor:
        logits.fill_(7.0)
        raise ZeroDivisionError("of all things")


NOT_A_PROCESSOR = dict
"""Can be made without arguments, and has none of the methods."""


def state(params: SamplingParams, output: Sequence[int] = (), index: int = 0) -> SamplingState:
    return SamplingState(params, [5, 6], output, 1, index, (2,), VOCAB_SIZE)


def sample(logits: Tensor, states: Sequence[SamplingState], *processors: Any) -> SampleResult:
    return Sampler(VOCAB_SIZE, 2**20, cpu, processors).sample(logits.clone(), states)


def random_logits(rows: int) -> Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(rows)) * 3


def only(token_id: int) -> Any:
    def keep(output_token_ids: Sequence[int], logits: Tensor) -> Tensor:
        kept = torch.full_like(logits, -torch.inf)
        kept[token_id] = 0.0
        return kept

    return keep


def test_a_callable_sees_prompt_output_and_a_row_of_logits() -> None:
    seen: list[Any] = []

    def with_prompt(prompt: Sequence[int], output: Sequence[int], logits: Tensor) -> Tensor:
        seen.append((prompt, output, logits.clone()))
        return logits.roll(1)

    def without_prompt(output: Sequence[int], logits: Tensor) -> Tensor:
        seen.append((output, logits.clone()))
        return logits

    logits = random_logits(2)
    one = state(GREEDY.with_changes(logits_processors=[with_prompt, without_prompt]), [8, 9])
    result = sample(logits, [one, state(GREEDY)])
    assert result.token_ids == [(int(logits[0].argmax()) + 1) % VOCAB_SIZE, int(logits[1].argmax())]
    (prompt, output, row), (again, rolled) = seen
    assert (prompt, output, again) == ((5, 6), (8, 9), (8, 9))
    assert torch.equal(row, logits[0])
    assert torch.equal(rolled, logits[0].roll(1)), "the second gets what the first returned"
    one.append(3)
    sample(logits[:1], [one])
    assert seen[-1][0] == (8, 9, 3)


def test_masks_come_after_processors_and_raw_logprobs_before() -> None:
    logits = random_logits(1)
    params = GREEDY.with_changes(logits_processors=only(4), allowed_token_ids=[4, 5], logprobs=0)
    result = sample(logits, [state(params)])
    assert result.token_ids == [4]
    assert result.logprobs[0] is not None
    np.testing.assert_allclose(result.logprobs[0].logprobs, [logits[0].log_softmax(-1)[4]], atol=1e-6)
    processed = sample(logits, [state(params.with_changes(logprobs_mode="processed_logprobs"))])
    assert processed.logprobs[0] is not None
    assert processed.logprobs[0].logprobs == [0.0]
    (error,) = sample(logits, [state(params.with_changes(allowed_token_ids=[5]))]).errors
    assert error is not None
    assert "no token is left" in error


def test_a_batch_processor_sees_the_rows_that_it_wants() -> None:
    logits = random_logits(4)
    best = logits.argmax(dim=-1).tolist()
    seen: list[list[tuple[Sequence[int], Sequence[int], int]]] = []

    class Watching(Banner):
        def apply(self, logits: Tensor, rows: Sequence[RowView]) -> Tensor:
            seen.append([(row.prompt_token_ids, row.output_token_ids, row.sample_index) for row in rows])
            return super().apply(logits, rows)

    states = [
        state(GREEDY.with_changes(extra={"ban": str(best[row])}) if row % 2 else GREEDY, [row], row) for row in range(4)
    ]
    result = sample(logits, states, Watching())
    assert seen == [[([5, 6], [1], 1), ([5, 6], [3], 3)]]
    second = logits.topk(2).indices[:, 1].tolist()
    assert result.token_ids == [best[0], second[1], best[2], second[3]]


def raising(output: Sequence[int], logits: Tensor) -> Tensor:
    logits.fill_(7.0)
    raise KeyError("lost")


def returning_nothing(output: Sequence[int], logits: Tensor) -> None:
    logits[:] = 0.0


def shortening(output: Sequence[int], logits: Tensor) -> Tensor:
    return logits[:3]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (raising, "the logits processor raising failed: KeyError: 'lost'"),
        (returning_nothing, "it returned NoneType; it must return the logits, a tensor"),
        (shortening, "it returned a tensor of shape [3]; the logits have [40]"),
        (Faulty(), "the logits processor Faulty failed: ZeroDivisionError: of all things"),
    ],
)
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=5)])
def test_a_fault_ends_its_own_rows_and_no_other_loses_a_bit(fault: Any, words: str, params: SamplingParams) -> None:
    logits = random_logits(6)
    params = params.with_changes(logprobs=3)
    expected = sample(logits, [state(params, index=row) for row in range(6)])
    batched = (fault,) if isinstance(fault, Faulty) else ()
    changes: dict[str, Any] = {"extra": {"ban": "1"}} if batched else {"logits_processors": [fault, only(1)]}
    states = [state(params.with_changes(**changes) if row in (1, 4) else params, index=row) for row in range(6)]
    result = sample(logits, states, *batched, Banner())
    for row in range(6):
        error = result.errors[row]
        if row in (1, 4):
            assert result.token_ids[row] == -1
            assert result.logprobs[row] is None
            assert error is not None
            assert words in error
        else:
            assert (result.token_ids[row], result.logprobs[row]) == (expected.token_ids[row], expected.logprobs[row])
            assert error is None


def test_a_processor_that_cannot_say_what_it_wants_ends_whom_it_was_asked_about() -> None:
    class Unsure(Banner):
        def wants(self, params: SamplingParams) -> bool:
            return bool(params.extra["ban"])

    result = sample(random_logits(2), [state(GREEDY), state(GREEDY.with_changes(extra={"ban": "3"}))], Unsure())
    assert result.errors[0] == "the logits processor Unsure failed: KeyError: 'ban'"
    assert result.errors[1] is None


def test_processors_by_name_and_as_objects_in_their_order() -> None:
    mine = Faulty()
    loaded = load_processors([f"{__name__}:Banner", mine])
    assert (type(loaded[0]), loaded[1]) == (Banner, mine)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("json", "logits_processors holds 'json'; write package.module:Class"),
        ("no_such_module:X", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:no_such_class", "AttributeError: module 'json' has no attribute"),
        ("json:loads", "be made without arguments"),
        (f"{__name__}:NOT_A_PROCESSOR", "has no methods wants(params) and apply(logits, rows)"),
        (Banner, "has no methods wants(params) and apply(logits, rows)"),
        (3, "the logits processor 3 has no methods"),
    ],
)
def test_what_cannot_be_loaded_is_refused(named: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_processors([named])
    assert words in str(caught.value)
