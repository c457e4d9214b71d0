"""Token ids become deltas of text; stop strings end samples; late tokens of ended samples are ignored."""

import dataclasses
from typing import Any

import pytest

from quire.engine.checkpoint import bundled_folder
from quire.engine.output_processor import OutputProcessor
from quire.engine.tokenizer import Tokenizer
from quire.outputs import RequestCounts, RequestOutput, SequenceDelta, StepDeltas
from quire.request import Request
from quire.sampling_params import SamplingParams
from quire.step import TokenLogprobs

TOKENIZER = Tokenizer.from_folder(bundled_folder())
TEXT = "What light through yonder window breaks?"
IDS = TOKENIZER.encode(TEXT)


def make_processor(**params: Any) -> OutputProcessor:
    processor = OutputProcessor(TOKENIZER, clock=lambda: 1.0)
    request = Request(request_id="a", prompt_token_ids=[1], params=SamplingParams(**params), max_tokens=100)
    processor.add(request, "prompt")
    return processor


def run(processor: OutputProcessor, ids: list[int], *, reason: str | None = "length", **last: Any) -> RequestOutput:
    """Feed one token a step; the last one ends the sample with `reason`."""
    total = RequestOutput("a", "prompt", [1], [])
    for place, token_id in enumerate(ids):
        final = place == len(ids) - 1
        delta = SequenceDelta("a", 0, [token_id], finish_reason=reason if final else None, **(last if final else {}))
        for output in processor.process(StepDeltas(others=[delta]))[0]:
            total.extend(output)
    return total


def test_deltas_add_up_to_the_text() -> None:
    output = run(make_processor(), IDS)
    assert output.finished
    assert output.outputs[0].text == TEXT
    assert output.outputs[0].token_ids == IDS
    assert output.outputs[0].finish_reason == "length"


def test_a_stop_token_is_no_text_unless_asked_for() -> None:
    output = run(make_processor(), IDS, reason="stop", stop_reason=IDS[-1])
    assert output.outputs[0].text == TOKENIZER.decode(IDS[:-1])
    assert output.outputs[0].stop_reason == IDS[-1]
    assert run(make_processor(include_stop_str_in_output=True), IDS, reason="stop").outputs[0].text == TEXT


def test_a_stop_string_ends_the_sample_and_is_reported_for_the_core() -> None:
    processor = make_processor(stop=["through"])
    total = RequestOutput("a", "prompt", [1], [])
    ended = []
    for token_id in IDS:
        outputs, stopped = processor.process(StepDeltas(others=[SequenceDelta("a", 0, [token_id])]))
        ended += stopped
        for output in outputs:
            total.extend(output)
    assert ended == [("a", 0)]
    assert total.finished
    assert total.outputs[0].text == "What light "
    assert (total.outputs[0].finish_reason, total.outputs[0].stop_reason) == ("stop", "through")
    assert TOKENIZER.decode(total.outputs[0].token_ids).endswith("through")
    assert len(processor) == 0


def test_a_stop_string_in_the_step_that_reached_the_limit_wins_and_is_reported_once() -> None:
    processor = make_processor(stop=["breaks"])
    for token_id in IDS[:-1]:
        outputs, stopped = processor.process(StepDeltas(others=[SequenceDelta("a", 0, [token_id])]))
        if stopped:
            break
    else:
        outputs, stopped = processor.process(
            StepDeltas(others=[SequenceDelta("a", 0, IDS[-1:], finish_reason="length")])
        )
        assert stopped == []
    assert outputs[0].outputs[0].finish_reason == "stop"


def test_samples_end_one_by_one() -> None:
    processor = make_processor(n=2)
    (first,), _ = processor.process(
        StepDeltas(others=[SequenceDelta("a", 0, IDS[:1], finish_reason="stop"), SequenceDelta("a", 1, IDS[:1])])
    )
    assert [output.index for output in first.outputs] == [0, 1]
    assert not first.finished
    (second,), _ = processor.process(
        StepDeltas(others=[SequenceDelta("a", 0, IDS[:1]), SequenceDelta("a", 1, IDS[1:2], finish_reason="length")])
    )
    assert [output.index for output in second.outputs] == [1]
    assert second.finished


def test_logprobs_carry_text_and_add_up() -> None:
    processor = make_processor(logprobs=1, prompt_logprobs=0)
    entry = TokenLogprobs([IDS[0], IDS[1]], [-1.0, -0.5], [2, 1])
    (output,), _ = processor.process(StepDeltas(others=[SequenceDelta("a", 0, [], prompt_logprobs=[entry])]))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert output.outputs == []
    (output,), _ = processor.process(StepDeltas(others=[SequenceDelta("a", 0, IDS[:1], logprobs=[entry])]))
    (logprobs,) = output.outputs[0].logprobs or []
    assert list(logprobs) == [IDS[0], IDS[1]]
    assert (logprobs[IDS[0]].logprob, logprobs[IDS[0]].rank) == (-1.0, 2)
    assert logprobs[IDS[0]].decoded_token == TOKENIZER.id_to_text(IDS[0])
    assert output.outputs[0].cumulative_logprob == -1.0


def test_errors_and_aborted_requests() -> None:
    processor = make_processor()
    (output,), _ = processor.process(
        StepDeltas(others=[SequenceDelta("a", 0, [], finish_reason="error", error="logits hold NaN")])
    )
    assert (output.finished, output.outputs[0].finish_reason, output.outputs[0].error) == (
        True,
        "error",
        "logits hold NaN",
    )
    processor = make_processor()
    processor.discard("a")
    assert processor.process(
        StepDeltas(others=[SequenceDelta("a", 0, IDS[:1]), SequenceDelta("unknown", 0, IDS[:1])])
    ) == ([], [])


def test_without_detokenising_there_are_ids_only() -> None:
    output = run(make_processor(detokenize=False), IDS)
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", IDS)


@pytest.mark.parametrize("batch_id", [0, 1])
@pytest.mark.parametrize("params", [{}, {"detokenize": False}, {"stop": ["window"]}, {"n": 2}])
def test_an_output_that_grows_is_the_sum_of_the_deltas(params: dict[str, Any], batch_id: int) -> None:
    """Most tokens arrive without a `SequenceDelta`."""
    request = Request(request_id="a", prompt_token_ids=[1], params=SamplingParams(**params), max_tokens=100)
    streaming = OutputProcessor(TOKENIZER, clock=lambda: 1.0)
    growing = OutputProcessor(TOKENIZER, clock=lambda: 1.0, outputs_grow=True)
    total, whole = streaming.add(request, "prompt"), growing.add(request, "prompt")
    samples = [("a", index) for index in range(request.params.n)]
    counts = RequestCounts(0.5, 1, 0, 0, 0)
    for place, token_id in enumerate(IDS):
        if 0 < place < len(IDS) - 1:
            deltas = StepDeltas(samples, [token_id] * len(samples), batch_id)
        else:
            reason = "length" if place else None
            others = [SequenceDelta(*each, [token_id], finish_reason=reason, counts=counts) for each in samples]
            deltas = StepDeltas(others=others)
        outputs, stopped = streaming.process(deltas)
        for output in outputs:
            total.extend(output)
        grown, stopped_too = growing.process(deltas)
        assert [id(each) for each in grown] == [id(whole)] * len(outputs)
        assert stopped == stopped_too
    assert total.finished
    assert dataclasses.asdict(whole) == dataclasses.asdict(total)


def test_a_new_core_numbers_its_batches_anew() -> None:
    processor = OutputProcessor(TOKENIZER, clock=lambda: 1.0, outputs_grow=True)
    wholes = []
    for request_id in ("a", "b"):
        params = SamplingParams(detokenize=False)
        request = Request(request_id=request_id, prompt_token_ids=[1], params=params, max_tokens=100)
        wholes.append(processor.add(request, None))
        processor.process(StepDeltas(others=[SequenceDelta(request_id, 0, [1])]))
    processor.process(StepDeltas([("a", 0), ("b", 0)], [2, 3], 1))
    processor.restart()
    processor.process(StepDeltas([("b", 0)], [4], 1))
    assert [whole.outputs[0].token_ids for whole in wholes] == [[1, 2], [1, 3, 4]]


@pytest.mark.parametrize("batch_id", [0, 7])
def test_a_repeated_batch_grows_in_place(batch_id: int) -> None:
    """Also after a request of the batch was aborted, and with other deltas in the same step. An id of 0 says nothing
    about the samples."""
    processor = OutputProcessor(TOKENIZER, clock=lambda: 1.0, outputs_grow=True)
    requests = {"a": 1, "b": 2, "c": 1}
    wholes = {}
    for request_id, n in requests.items():
        params = SamplingParams(n=n, detokenize=False)
        request = Request(request_id=request_id, prompt_token_ids=[1], params=params, max_tokens=100)
        wholes[request_id] = processor.add(request, None)

    def tokens() -> dict[str, list[list[int]]]:
        return {request_id: [sample.token_ids for sample in whole.outputs] for request_id, whole in wholes.items()}

    samples = [(request_id, index) for request_id, n in requests.items() for index in range(n)]
    processor.process(StepDeltas(others=[SequenceDelta(*sample, [1]) for sample in samples]))
    first = samples[:3]
    for token_id in (2, 3):
        outputs, stopped = processor.process(
            StepDeltas(first, [token_id, 10 + token_id, 20 + token_id], batch_id, [SequenceDelta("c", 0, [token_id])])
        )
        assert {output.request_id for output in outputs} == {"a", "b", "c"}
        assert len(outputs) == 3
    outputs, stopped = processor.process(StepDeltas(first, [4, 14, 24], batch_id))
    assert ([output.request_id for output in outputs], stopped) == (["a", "b"], [])
    assert tokens() == {"a": [[1, 2, 3, 4]], "b": [[1, 12, 13, 14], [1, 22, 23, 24]], "c": [[1, 2, 3]]}
    processor.discard("a")
    outputs, _ = processor.process(StepDeltas(first, [5, 15, 25], batch_id))  # under way when the request was aborted
    assert [output.request_id for output in outputs] == ["b"]
    outputs, _ = processor.process(StepDeltas(samples[1:], [16, 26, 6], batch_id + 1 if batch_id else 0))
    assert [output.request_id for output in outputs] == ["b", "c"]
    assert tokens() == {
        "a": [[1, 2, 3, 4]],
        "b": [[1, 12, 13, 14, 15, 16], [1, 22, 23, 24, 25, 26]],
        "c": [[1, 2, 3, 6]],
    }
