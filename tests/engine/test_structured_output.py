"""Structured output in the whole engine: every constraint holds, and nothing else changes the tokens."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, RequestError, SamplingParams, StructuredOutputsParams
from quire.outputs import RequestOutput
from tests.checkpoints import make_checkpoint

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"}, "open": {"type": "boolean"}},
            "required": ["street", "open"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
JSON = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
PROMPTS = ["ROMEO:", "First Citizen:\nBefore we", "O"]
OPTIONS: dict[str, Any] = {"num_blocks": 400, "max_num_seqs": 16, "threads": 1, "dtype": "float32"}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(**OPTIONS)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token per byte, so that a text has a single tokenisation."""
    return make_checkpoint(tmp_path_factory.mktemp("random"), "llama", max_position_embeddings=512)


def run(llm: LLM, params: Any, prompts: Any = PROMPTS) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def texts(outputs: list[RequestOutput]) -> list[str]:
    for sample in (sample for output in outputs for sample in output.outputs):
        assert sample.finish_reason == "stop", sample
    return [sample.text for output in outputs for sample in output.outputs]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


def check_json(text: str) -> None:
    """Checks a value against SCHEMA in plain Python."""
    value = json.loads(text)
    assert list(value) == ["name", "age", "tags", "address"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 12
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 150
    assert len(value["tags"]) <= 3
    assert set(value["tags"]) <= {"red", "green", "blue"}
    assert set(value["address"]) == {"street", "open"}
    assert re.fullmatch("[A-Z][a-z]{1,6}", value["address"]["street"])
    assert type(value["address"]["open"]) is bool


@pytest.mark.parametrize("random", [False, True])
def test_json_follows_its_schema_at_any_temperature(llm: LLM, random_model: Path, random: bool) -> None:
    model = LLM(str(random_model), **OPTIONS) if random else llm
    for params in (
        SamplingParams(temperature=1.0, seed=5, n=4, max_tokens=220, structured_outputs=JSON),
        SamplingParams(temperature=0.0, max_tokens=220, structured_outputs=JSON),
    ):
        found = texts(run(model, params))
        for text in found:
            check_json(text)
        assert len(set(found)) > 1 or params.greedy


def test_json_object_is_one(llm: LLM) -> None:
    """A small model may write endless strings, so a truncated text must at least begin an object."""
    form = StructuredOutputsParams(json_object=True)
    params = SamplingParams(temperature=1.0, seed=1, n=4, max_tokens=120, structured_outputs=form)
    for output in run(llm, params):
        for sample in output.outputs:
            assert sample.text.startswith("{")
            if sample.finish_reason == "stop":
                assert isinstance(json.loads(sample.text), dict)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": r"[0-9]{3}-(north|south) [A-Z]{2}"}, r"[0-9]{3}-(north|south) [A-Z]{2}"),
        ({"regex": r"(ab){0,9}"}, r"(ab){0,9}"),
        ({"choice": ["yes", "no", "né 😀"]}, "yes|no|né 😀"),
        ({"grammar": 'start: x ("+" x)~1..3\nx: "a" | "(" x ")"'}, r"\(*a\)*(\+\(*a\)*){1,3}"),
        ({"grammar": 'root ::= "<" [a-z]{2,5} ">"'}, "<[a-z]{2,5}>"),
    ],
)
def test_every_form_holds_for_every_sample(llm: LLM, fields: dict[str, Any], pattern: str) -> None:
    form = StructuredOutputsParams(**fields)
    for text in texts(run(llm, SamplingParams(seed=2, n=4, max_tokens=80, structured_outputs=form))):
        assert re.fullmatch(pattern, text), text


def test_fast_forward_changes_no_token_and_saves_steps(random_model: Path) -> None:
    params = [
        SamplingParams(temperature=0.0, max_tokens=200, structured_outputs=JSON),
        SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=200, structured_outputs=JSON),
        SamplingParams(temperature=0.0, max_tokens=30, structured_outputs=JSON),
    ]
    fast, slow = LLM(str(random_model), **OPTIONS), LLM(str(random_model), **OPTIONS, fast_forward=False)
    assert tokens(run(fast, params)) == tokens(run(slow, params))
    assert fast.stats().total_generated_tokens == slow.stats().total_generated_tokens
    assert fast.stats().total_steps < 0.6 * slow.stats().total_steps
    assert len(tokens(run(fast, params))[-1]) == 30  # cut off where max_tokens ends inside a forced run


def test_with_logprobs_every_token_is_the_models(llm: LLM) -> None:
    plain = SamplingParams(temperature=0.0, max_tokens=200, structured_outputs=JSON)
    (with_logprobs,), (without,) = (run(llm, params, PROMPTS[0]) for params in (plain.with_changes(logprobs=1), plain))
    assert with_logprobs.outputs[0].logprobs is not None
    assert len(with_logprobs.outputs[0].logprobs) == len(with_logprobs.outputs[0].token_ids)
    assert with_logprobs.outputs[0].text == without.outputs[0].text


def test_preempted_samples_go_on_as_if_nothing_had_been(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=7, n=4, max_tokens=120, structured_outputs=JSON)
    small = LLM(**{**OPTIONS, "num_blocks": 130, "block_size": 4})
    outputs = run(small, params)
    assert small.stats().total_preemptions > 0
    assert tokens(outputs) == tokens(run(llm, params))


def test_every_kind_in_one_batch_gets_the_tokens_of_a_solo_run(llm: LLM) -> None:
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=11, n=2, max_tokens=40, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=1.0, seed=4, n=2, max_tokens=150, structured_outputs=JSON),
        SamplingParams(temperature=0.7, seed=5, max_tokens=40, structured_outputs=JSON, logprobs=1),
        SamplingParams(beam_width=3, n=2, max_tokens=30, structured_outputs=JSON),
        SamplingParams(beam_width=4, n=1, max_tokens=30, ignore_eos=True),
    ]
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(kinds))]
    mixed = run(llm, kinds, prompts)
    alone = [run(llm, params, prompt)[0] for params, prompt in zip(kinds, prompts, strict=True)]
    assert tokens(mixed) == tokens(alone)


def test_samples_end_by_other_reasons_too(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=200, structured_outputs=JSON)
    whole = run(llm, params, "O")[0].outputs[0].text
    (stopped,) = run(llm, params.with_changes(stop=['"age"']), "O")
    assert (stopped.outputs[0].text, stopped.outputs[0].stop_reason) == (whole.split('"age"')[0], '"age"')
    form = StructuredOutputsParams(regex="a{0,12}")
    (ignoring,) = run(llm, SamplingParams(ignore_eos=True, max_tokens=30, structured_outputs=form), "O")
    assert (ignoring.outputs[0].text, ignoring.outputs[0].finish_reason) == ("a" * 12, "stop")


def test_a_bad_grammar_stops_the_call_before_anything_runs(llm: LLM) -> None:
    steps = llm.stats().total_steps
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
    slow = SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "integer", "multipleOf": 999983}))
    for params, reason in ((bad, "unclosed group"), (slow, r"takes more than 0\.7 s to compile")):
        with pytest.raises(RequestError, match=reason):
            run(llm, [SamplingParams(), params], ["a", "b"])
    assert llm.stats().total_steps == steps
    assert texts(run(llm, SamplingParams(max_tokens=9, structured_outputs=StructuredOutputsParams(choice=("x",))), "a"))


def test_a_model_without_tokenizer_has_no_structured_outputs(random_model: Path, tmp_path: Path) -> None:
    for file in random_model.iterdir():
        if "tokenizer" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(RequestError, match=r"needs the model's tokenizer: .* is missing"):
        run(LLM(str(tmp_path), **OPTIONS), SamplingParams(structured_outputs=JSON, detokenize=False), [[5]])


def test_a_beam_that_ignores_the_end_ends_where_its_text_is_whole(llm: LLM) -> None:
    """With one end token, after which nothing follows; a text that can continue does."""
    choices = ["yes", "no", "never"]
    for form, expected in (
        (StructuredOutputsParams(choice=tuple(choices)), choices),
        (StructuredOutputsParams(regex="a{0,12}"), ["a" * 12]),
    ):
        params = SamplingParams(
            beam_width=3, n=len(expected), max_tokens=30, ignore_eos=True, structured_outputs=form, length_penalty=0.0
        )
        (output,) = run(llm, params, "O")
        assert sorted(texts([output])) == sorted(expected)
        for sample in output.outputs:
            assert sample.stop_reason is None
            assert [place for place, token in enumerate(sample.token_ids, 1) if token == 1] == [len(sample.token_ids)]


@pytest.mark.parametrize("width", [2, 4])
def test_every_beam_follows_the_form(llm: LLM, width: int) -> None:
    """With as many beams as choices, the search finds each choice once."""
    beams = SamplingParams(temperature=0.0, beam_width=width, n=width, max_tokens=200, structured_outputs=JSON)
    for output in run(llm, beams):
        found = texts([output])
        for text in found:
            check_json(text)
        assert len(set(output.outputs[0].token_ids)) > 1
    choices = ["yes", "no", "never", "anon"][:width]
    form = StructuredOutputsParams(choice=tuple(choices))
    for output in run(llm, beams.with_changes(structured_outputs=form, early_stopping=False, length_penalty=0.0)):
        assert set(texts([output])) <= set(choices)
    greedy = SamplingParams(temperature=0.0, max_tokens=200, structured_outputs=JSON)
    assert tokens(run(llm, beams.with_changes(beam_width=1, n=1), "O")) == [
        # A beam ends with an end token; a sample whose text is complete needs none.
        [*tokens(run(llm, greedy, "O"))[0], 1]
    ]
