"""Flaws published for other servers, tried on the engine: raw messages, batches, pairs of options, faulty rows."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import combinations
from typing import Any

import msgspec
import pytest
import torch

from quire import LLM, RequestError, SamplingParams, StructuredOutputsParams
from quire.engine import engine_process
from quire.engine.messages import Add, Refused, decode_to_engine, encode
from quire.grammar.cache import GrammarCache
from quire.grammar.compiled import Grammar
from quire.outputs import RequestOutput
from quire.request import Request
from quire.sampling.logit_edits import LogitEdits
from quire.sampling.sampler import Sampler
from quire.sampling.state import SamplingState
from quire.sampling.structured_output import GrammarState
from tests.engine.test_core import ScriptedExecutor, make_core, run

PROMPT = "First Citizen:\nBefore we proceed any further, hear me speak. First Citizen:"
SHORT: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "n": {"n": 2},
    "best_of": {"best_of": 3},
    "beams": {"beam_width": 2},
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 9.0},
    "top_p": {"top_p": 0.3},
    "top_k": {"top_k": 2},
    "min_p": {"min_p": 0.2},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": -2.0},
    "repetition": {"repetition_penalty": 1e4},
    "bias": {"logit_bias": {5: 100.0, 1023: -100.0}},
    "allowed": {"allowed_token_ids": tuple(range(3, 300))},
    "bad words": {"bad_words": ("the", " and")},
    "stop": {"stop": ("e", "\n")},
    "stop ids": {"stop_token_ids": (5, 6)},
    "min tokens": {"min_tokens": 5, "ignore_eos": False},
    "logprobs": {"logprobs": 3},
    "processed": {"logprobs": 2, "logprobs_mode": "processed_logprobs"},
    "prompt logprobs": {"prompt_logprobs": 1},
    "regex": {"structured_outputs": StructuredOutputsParams(regex="[a-z ]{2,9}"), "ignore_eos": False},
    "json": {
        "structured_outputs": StructuredOutputsParams(json={"type": "array", "maxItems": 1, "items": {"const": 1}})
    },
    "truncated": {"truncate_prompt_tokens": 3},
    "no text": {"detokenize": False},
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    options: dict[str, Any] = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
    with LLM(num_blocks=400, max_num_seqs=32, threads=1, dtype="float32", **options) as llm:
        yield llm


def tokens(outputs: list[RequestOutput]) -> list[list[tuple[list[int], str | None]]]:
    return [[(sample.token_ids, sample.finish_reason) for sample in output.outputs] for output in outputs]


def seeded(number: int, **options: Any) -> SamplingParams:
    return SamplingParams(**{"seed": number, **SHORT, **options})


# -- the engine's door ------------------------------------------------------------------------------------------------


class Sent(list[Any]):
    """A connection that keeps what the engine sends."""

    send = list.append


def raw(**changes: Any) -> bytes:
    """A message as a faulty front would write it: fields of the parameters that no `SamplingParams` can hold."""
    request = Request(request_id="r", prompt_token_ids=[5, 6], params=SamplingParams(), max_tokens=4)
    message = msgspec.msgpack.decode(encode(Add(request))[4:])
    message["request"]["params"].update(changes)
    return msgspec.msgpack.encode(message)


@pytest.mark.parametrize(
    "params",
    [
        *({"n": number} for number in (0, -1, 10**9, "2")),
        *({"logprobs": number} for number in (-2, 2**40)),
        *({"temperature": number} for number in (-1.0, float("nan"), float("inf"))),
        *({"allowed_token_ids": ids} for ids in ([-1], [], [2**40], ["x"])),
        {"logit_bias": {"x": 1.0}},
        {"bad_words_token_ids": [[]]},
        {"beam_width": 10**6},
    ],
    ids=str,
)
def test_16_messages_hold_only_what_parameters_can_hold(params: dict[str, Any]) -> None:
    """PYSEC-2026-4350: a second front end left a check out. Here the type itself refuses."""
    assert decode_to_engine(raw())
    with pytest.raises((msgspec.ValidationError, RequestError)):
        decode_to_engine(raw(**params))


@pytest.mark.parametrize(
    ("changes", "params"),
    [
        ({}, {"logprobs": 300}),
        ({}, {"prompt_logprobs": 300}),
        ({}, {"allowed_token_ids": [300]}),
        ({}, {"stop_token_ids": [299, 300]}),
        ({}, {"logit_bias": {300: 1.0}}),
        ({}, {"bad_words_token_ids": [[5, 300]]}),
        ({"prompt_token_ids": [5, 300]}, {}),
        ({"prompt_token_ids": [-1]}, {}),
        ({"prompt_token_ids": []}, {}),
        ({"prompt_token_ids": [1] * 201}, {}),
    ],
    ids=str,
)
def test_16_the_engine_checks_what_its_model_limits(changes: dict[str, Any], params: dict[str, Any]) -> None:
    """The engine's door refuses the request alone, and the others go on."""
    core, sent = make_core(ScriptedExecutor()), Sent()
    message = msgspec.msgpack.decode(raw(**params))
    message["request"].update(changes)
    engine_process._handle(core, decode_to_engine(msgspec.msgpack.encode(message)), sent)  # type: ignore[arg-type]
    (refusal,) = sent
    assert isinstance(refusal, Refused)
    assert (refusal.request_id, bool(refusal.param)) == ("r", True)
    engine_process._handle(core, decode_to_engine(raw()), sent)  # type: ignore[arg-type]
    assert run(core)["r"][0] == 100


# -- batches ----------------------------------------------------------------------------------------------------------


def test_27_company_and_order_change_nothing(llm: LLM) -> None:
    """GHSA-v97p-wpxp-px84, GHSA-fpch-3xrf-7q96: state of a row that another request had before."""
    mixed = [
        seeded(number, **options) for number, options in enumerate(OPTIONS.values()) if "beam_width" not in options
    ]
    prompts = [PROMPT[: 9 + 3 * number] for number in range(len(mixed))]
    alone = [
        tokens(llm.generate([prompt], params, use_tqdm=False))[0] for prompt, params in zip(prompts, mixed, strict=True)
    ]
    shuffled = list(range(len(mixed)))
    for turn in range(3):
        random.Random(turn).shuffle(shuffled)
        outputs = llm.generate([prompts[at] for at in shuffled], [mixed[at] for at in shuffled], use_tqdm=False)
        assert tokens(outputs) == [alone[at] for at in shuffled]


def test_28_all_pairs_of_options_with_drafts(llm: LLM) -> None:
    """CVE-2026-44223, CVE-2026-105922: a penalty and a draft had different shapes, and the engine died."""
    pairs = []
    for one, other in combinations(OPTIONS, 2):
        with suppress(RequestError):  # a pair that cannot work is refused before anything runs
            pairs.append(seeded(1, **{**OPTIONS[one], **OPTIONS[other]}))
    assert len(pairs) > 200
    accepted = 0
    for first in range(0, len(pairs), 64):
        outputs = llm.generate([PROMPT] * len(pairs[first : first + 64]), pairs[first : first + 64], use_tqdm=False)
        ends = {sample.finish_reason for output in outputs for sample in output.outputs}
        assert ends <= {"length", "stop", "error"}
        accepted += len(outputs)
    assert accepted == len(pairs)


@pytest.mark.parametrize("token", [1024, 2**31 - 1, -1, 2**31, 2**63, 10**30])
def test_38_no_token_of_a_client_leads_out_of_the_tables(token: int, llm: LLM) -> None:
    """CVE-2026-21869, CVE-2026-43629: ids beyond the vocabulary, in every field that takes them."""
    for prompt, options in (
        ([5, token], {}),
        ([5], {"logit_bias": {token: 1.0}}),
        ([5], {"allowed_token_ids": (5, token)}),
        ([5], {"stop_token_ids": (token,)}),
        ([5], {"bad_words_token_ids": ((5, token),)}),
    ):
        with pytest.raises(RequestError, match=str(token)):
            llm.generate([{"prompt_token_ids": prompt}], seeded(1, **options), use_tqdm=False)


# -- faults of one row ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_faulty_row_ends_one_sample_alone(
    value: float, drafts: bool, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven neighbours of each kind keep every token and every bit of their log-probabilities."""
    prompts = [PROMPT if drafts else PROMPT[: 5 + number] for number in range(8)]
    mixed = [seeded(number, max_tokens=12, logprobs=1, temperature=number % 2) for number in range(8)]
    before = llm.generate(prompts, mixed, use_tqdm=False)
    sample = Sampler.sample

    def breaks(self: Sampler, logits: torch.Tensor, states: Any, states_id: int = 0) -> Any:
        for row, state in enumerate(states):
            if "fault" in state.params.extra and len(state.output_token_ids) >= 3:
                logits[row] = value
        return sample(self, logits, states, states_id)

    monkeypatch.setattr(Sampler, "sample", breaks)
    faulty = [*mixed[:4], mixed[4].with_changes(extra={"fault": "yes"}), *mixed[5:]]
    after = llm.generate(prompts, faulty, use_tqdm=False)
    for number, (expected, found) in enumerate(zip(before, after, strict=True)):
        if number == 4:
            assert found.outputs[0].finish_reason == "error"
            assert found.outputs[0].error
            assert len(found.outputs[0].token_ids) < 12
        else:
            assert tokens([found]) == tokens([expected])
            assert found.outputs[0].logprobs == expected.outputs[0].logprobs


@pytest.mark.parametrize("when", ["each step", "first step"])
def test_a_fault_of_the_sampler_ends_one_sample_alone(when: str, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception while a row's state is read. Its neighbours have edits that would show if they were made twice."""
    options: list[dict[str, Any]] = [
        {"repetition_penalty": 1.7, "frequency_penalty": 0.4},
        {"logit_bias": {5: 3.0, 300: -2.0}},
        {"bad_words": ("the", " and"), "min_tokens": 4},
        {"temperature": 0.0, "logprobs": 2},
        {"bad_words": ("e",)},
        {"beam_width": 2, "temperature": 0.0},
        {"allowed_token_ids": tuple(range(3, 300)), "n": 2},
    ]
    mixed = [seeded(number, max_tokens=12, **each) for number, each in enumerate(options)]
    before = llm.generate([PROMPT] * len(mixed), mixed, use_tqdm=False)
    read, make = SamplingState.banned_ids, LogitEdits.__init__

    def check(states: Sequence[SamplingState], num_tokens: int) -> None:
        if any("fault" in state.params.extra and len(state.output_token_ids) >= num_tokens for state in states):
            raise KeyError("a fault of one row")

    def reads(self: SamplingState) -> list[int]:
        check([self], 3)
        return read(self)

    def makes(self: LogitEdits, states: Sequence[SamplingState], vocab_size: int) -> None:
        check(states, 0)
        make(self, states, vocab_size)

    if when == "each step":
        monkeypatch.setattr(SamplingState, "banned_ids", reads)
    else:
        monkeypatch.setattr(LogitEdits, "__init__", makes)
    mixed[4] = mixed[4].with_changes(extra={"fault": "yes"})
    after = llm.generate([PROMPT] * len(mixed), mixed, use_tqdm=False)
    (broken,) = after[4].outputs
    assert (broken.finish_reason, len(broken.token_ids) < 12) == ("error", True)
    assert broken.error is not None
    assert "the sampler failed for this sample (KeyError)" in broken.error
    others = [number for number in range(len(mixed)) if number != 4]
    assert tokens([after[number] for number in others]) == tokens([before[number] for number in others])
    assert after[3].outputs[0].logprobs == before[3].outputs[0].logprobs


def test_a_grammar_that_breaks_in_use_ends_one_sample_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    regexes = [StructuredOutputsParams(regex=f"[a-z ]{{20}}{number}") for number in range(4)]
    mixed = [seeded(number, max_tokens=12, structured_outputs=regex) for number, regex in enumerate(regexes)]
    mixed += [seeded(9), seeded(10, temperature=0)]
    before = tokens(llm.generate([PROMPT] * 6, mixed, use_tqdm=False))
    append, find = GrammarState.append, GrammarCache.find
    faulty: list[Grammar | None] = []
    num_tokens: Counter[int] = Counter()

    def finds(self: GrammarCache, constraint: StructuredOutputsParams) -> Grammar | None:
        grammar = find(self, constraint)
        if constraint == regexes[2]:
            faulty.append(grammar)
        return grammar

    def breaks(self: GrammarState, token_id: int) -> None:
        num_tokens[id(self)] += 1
        is_faulty = any(self.grammar is grammar for grammar in faulty) and num_tokens[id(self)] > 3
        append(self, 1 if is_faulty else token_id)

    monkeypatch.setattr(GrammarCache, "find", finds)
    monkeypatch.setattr(GrammarState, "append", breaks)
    outputs = llm.generate([PROMPT] * 6, mixed, use_tqdm=False)
    assert outputs[2].outputs[0].finish_reason == "error"
    found = tokens(outputs)
    assert [*found[:2], *found[3:]] == [*before[:2], *before[3:]]
