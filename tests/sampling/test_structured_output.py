"""MaskWorker and GrammarState: masks where they belong, states that fork, resume and fail alone."""

import numpy as np
import pytest
import torch

from quire.engine.checkpoint import bundled_folder
from quire.engine.tokenizer import Tokenizer
from quire.grammar.compiled import Grammar
from quire.grammar.compiler import GrammarCompiler
from quire.kernels import cpu
from quire.sampling import structured_output
from quire.sampling.sampler import Sampler
from quire.sampling.state import SamplingState
from quire.sampling.structured_output import GrammarState, MaskPenalties, MaskWorker
from quire.sampling_params import SamplingParams
from quire.structured_outputs import StructuredOutputsParams

VOCAB_SIZE, EOS = 1024, 1
ROOM = 2**24
"""Bytes for log-probabilities; no request here asks for any."""
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    text = (bundled_folder() / "tokenizer.json").read_text()
    return GrammarCompiler(text, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(bundled_folder())


def regex(compiler: GrammarCompiler, pattern: str) -> Grammar:
    return compiler.compile(StructuredOutputsParams(regex=pattern))


@pytest.fixture(autouse=True, params=["inline", "thread"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few masks are computed at once, many in a thread; these are few."""
    if request.param == "thread":
        monkeypatch.setattr(structured_output, "INLINE_WORDS", 0)


def fill(states: list[GrammarState], vocab_size: int = VOCAB_SIZE) -> list[set[int]]:
    """What each state allows."""
    worker = MaskWorker(vocab_size)
    worker.start(states)
    worker.join()
    penalties = MaskPenalties(states, vocab_size).compute()
    assert penalties.shape == (len(states), vocab_size)
    assert set(np.unique(penalties)) <= {0.0, -np.inf}
    return [set(np.flatnonzero(row == 0.0).tolist()) for row in penalties]


def letters(tokenizer: Tokenizer, text: str) -> set[int]:
    """Tokens made of these letters alone."""
    special = tokenizer.special_ids
    return {
        i
        for i in range(VOCAB_SIZE)
        if i not in special and (b := tokenizer.token_bytes(i)) and set(b) <= {*text.encode()}
    }


def test_one_call_fills_the_masks_of_different_grammars(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammars = [regex(compiler, pattern) for pattern in ("[ab]+", "[cd]*", "[ab]+")]
    states = [GrammarState(grammar) for grammar in grammars]
    assert fill(states) == [
        letters(tokenizer, "ab"),
        letters(tokenizer, "cd") | {EOS},
        letters(tokenizer, "ab"),
    ]
    assert fill(states[:1]) == [letters(tokenizer, "ab")]


def test_a_model_with_fewer_tokens_than_the_tokenizer_sees_its_own(compiler: GrammarCompiler) -> None:
    (whole,) = fill([GrammarState(regex(compiler, "[a-z ]+"))])
    (part,) = fill([GrammarState(regex(compiler, "[a-z ]+"))], vocab_size=300)
    assert part == {token for token in whole if token < 300}


@pytest.mark.parametrize("cut", range(4))
def test_a_resumed_state_equals_one_that_ran_through(compiler: GrammarCompiler, tokenizer: Tokenizer, cut: int) -> None:
    grammar = regex(compiler, "[ab]c[de]f?")
    tokens = [next(iter(letters(tokenizer, letter))) for letter in "acd"]
    ran = GrammarState(grammar)
    for token in tokens[:cut]:
        ran.append(token)
    resumed = GrammarState(grammar, tokens[:cut])
    first, second = fill([ran, resumed])
    assert first == second
    assert ran.complete == resumed.complete is False


def test_a_fork_is_independent(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    (a,), (b,), (f,) = (letters(tokenizer, letter) & {*range(300)} for letter in "abf")
    params = SamplingParams(bad_words_token_ids=((b, f),), presence_penalty=1.0)
    state = SamplingState(params, [], [], 0, 0, (EOS,), VOCAB_SIZE, GrammarState(regex(compiler, "(a|b)(ax?|f)")))
    fork = state.fork()
    fork.append(b)
    assert (state.position, fork.position) == (0, 1)
    assert (state.banned_ids(), fork.banned_ids()) == ([], [f])
    assert state.token_counts is not None
    assert list(state.token_counts.ids) == []
    assert state.grammar is not None
    assert fork.grammar is not None
    assert fill([state.grammar, fork.grammar]) == [{a, b} | letters(tokenizer, "ab") & fill([state.grammar])[0], {a, f}]
    state.append(a)
    fork.append(f)
    assert (state.grammar.complete, fork.grammar.complete) == (False, True)


def test_the_end_is_allowed_only_where_the_text_is_whole(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    state = GrammarState(regex(compiler, "(ab)+"))
    token = {letter: next(i for i in letters(tokenizer, letter) if i < 300) for letter in "ab"}
    assert EOS not in fill([state])[0]
    state.append(token["a"])
    assert EOS not in fill([state])[0]
    state.append(token["b"])
    assert EOS in fill([state])[0]
    ignoring = GrammarState(regex(compiler, "(ab)+"), [token["a"], token["b"]], banned_ids=(EOS,))
    assert EOS not in fill([ignoring])[0]


def test_a_wrong_token_ends_this_sequence_alone(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = regex(compiler, "[ab]+")
    wrong, right = GrammarState(grammar), GrammarState(grammar)
    wrong.append(EOS)
    assert wrong.error is not None
    assert grammar.worn
    assert not wrong.complete
    assert wrong.take_forced(5) == []
    assert fill([wrong, right]) == [set(), letters(tokenizer, "ab")]
    states = [SamplingState(GREEDY, [], [], 0, 0, (), VOCAB_SIZE, grammar=each) for each in (wrong, right)]
    result = Sampler(VOCAB_SIZE, ROOM, cpu).sample(torch.zeros(2, VOCAB_SIZE), states)
    assert result.errors[1] is None
    assert result.token_ids[1] == min(letters(tokenizer, "ab"))
    assert "the grammar of structured_outputs failed" in (result.errors[0] or "")


@pytest.mark.parametrize("vocab_size", [300, VOCAB_SIZE])
def test_a_grammar_that_is_missing_ends_its_sequence_alone(compiler: GrammarCompiler, vocab_size: int) -> None:
    missing = GrammarState(None, error="not compiled")
    assert fill([missing], vocab_size) == [set()]
    none, some = fill([missing, GrammarState(regex(compiler, "[ab]+"))], vocab_size)
    assert not none
    assert some
    assert fill([missing], vocab_size) == [set()]


@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_a_fault_does_not_hide_behind_a_grammar(compiler: GrammarCompiler, tokenizer: Tokenizer, fault: float) -> None:
    state = SamplingState(GREEDY, [], [], 0, 0, (), VOCAB_SIZE, GrammarState(regex(compiler, "[ab]+")))
    assert state.grammar is not None
    (allowed,) = fill([state.grammar])
    for place in (min(allowed), min({*range(VOCAB_SIZE)} - allowed)):
        logits = torch.zeros(1, VOCAB_SIZE)
        logits[0, place] = fault
        assert Sampler(VOCAB_SIZE, ROOM, cpu).sample(logits, [state]).errors != [None]


def test_masks_come_before_the_other_edits(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """A bias cannot bring back what the grammar forbids, allowed ids narrow it, and neighbours keep every bit."""
    ab = sorted(letters(tokenizer, "ab"))
    params = SamplingParams(temperature=0.0, logit_bias={2: 100.0}, allowed_token_ids=(2, ab[1]))
    state = SamplingState(params, [], [], 0, 0, (), VOCAB_SIZE, GrammarState(regex(compiler, "[ab]+")))
    plain = SamplingState(SamplingParams(seed=1), [], [], 1, 0, (), VOCAB_SIZE)
    assert state.grammar is not None
    fill([state.grammar])
    logits = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    together = Sampler(VOCAB_SIZE, ROOM, cpu).sample(logits.clone(), [state, plain])
    assert together.token_ids[0] == ab[1]
    assert together.token_ids[1] == Sampler(VOCAB_SIZE, ROOM, cpu).sample(logits[1:].clone(), [plain]).token_ids[0]


def test_forced_tokens_are_followed_up_to_the_limit(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    text = "the king of france"
    grammar = regex(compiler, f"{text}[.!]")
    one, other = GrammarState(grammar, fast_forwards=True), GrammarState(grammar, fast_forwards=True)
    forced = one.take_forced(100)
    assert len(forced) > 3
    assert text.startswith(tokenizer.decode(forced))
    assert other.take_forced(2) == forced[:2]
    assert other.take_forced(100) == forced[2:]
    assert fill([one]) == fill([other])
    assert GrammarState(grammar).take_forced(100) == []


def test_a_whole_text_ends_whatever_min_tokens_says(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    token = next(i for i in letters(tokenizer, "a") if i < 300)
    params = SamplingParams(min_tokens=5)
    going = SamplingState(params, [], [token], 0, 0, (EOS,), VOCAB_SIZE, GrammarState(regex(compiler, "a+"), [token]))
    whole = SamplingState(params, [], [token], 0, 0, (EOS,), VOCAB_SIZE, GrammarState(regex(compiler, "a"), [token]))
    assert (going.banned_ids(), whole.banned_ids()) == ([EOS], [])
