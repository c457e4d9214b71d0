"""Detokenizer: any tokens in any chunks give the same text, whole characters, and stop strings on time."""

import json
import random
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from quire.engine.detokenizer import Detokenizer, StopMatch
from quire.engine.tokenizer import Tokenizer
from quire.sampling_params import SamplingParams

DATA = Path(__file__).parents[1] / "data" / "tokenizers"
NAMES = sorted(folder.name for folder in DATA.iterdir())
BYTE_LEVEL = [name for name in NAMES if not name.startswith("mistral")]

Load = Callable[[str], Tokenizer]


@cache
def texts(name: str) -> list[str]:
    rows = map(json.loads, (DATA / name / "vectors.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["text"] for row in rows]


def chunks(ids: Sequence[int], draw: random.Random) -> list[Sequence[int]]:
    """The ids, split at random places; chunks may be empty."""
    cuts = sorted(draw.choices(range(len(ids) + 1), k=draw.randrange(len(ids) + 2)))
    return [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def stream(
    tokenizer: Tokenizer,
    chunked: Sequence[Sequence[int]],
    prompt: Sequence[int] = (),
    **params: object,
) -> tuple[list[str], Detokenizer, StopMatch | None]:
    """All deltas, the detokenizer, and the stop string that ended it."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(**params), prompt)  # type: ignore[arg-type]  # a test's shorthand
    deltas = []
    match = None
    for i, chunk in enumerate(chunked):
        match = detokenizer.append(chunk, finished=i == len(chunked) - 1)
        deltas.append(detokenizer.delta())
        assert detokenizer.text == "".join(deltas)
        if match:
            break
    return deltas, detokenizer, match


def one_by_one(ids: Sequence[int]) -> list[Sequence[int]]:
    return [[token_id] for token_id in ids] or [[]]


@pytest.fixture(scope="module")
def word_pieces() -> Tokenizer:
    """A vocabulary whose decoder is more than joining bytes: "##s" goes to the word before it, others get a space."""
    words = ["[UNK]", "to", "be", "or", "not", "##s", ".", ",", "it", "'", "##er"]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens([AddedToken("[SEP]", special=True), AddedToken("[CLS]", special=True)])
    return Tokenizer(backend, {})


# --- the text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skip", [True, False])
def test_published_texts_in_any_chunking(load_tokenizer: Load, name: str, skip: bool) -> None:
    tokenizer = load_tokenizer(name)
    draw = random.Random(name)
    for text in texts(name):
        ids = tokenizer.encode(text)
        expected = tokenizer.decode(ids, skip_special_tokens=skip)
        for chunked in (one_by_one(ids), chunks(ids, draw), [ids]):
            deltas, _, _ = stream(tokenizer, chunked, skip_special_tokens=skip)
            assert "".join(deltas) == expected
            assert "\ufffd" not in "".join(deltas) or "\ufffd" in text


@pytest.mark.parametrize("name", BYTE_LEVEL)
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), length=st.integers(0, 40), skip=st.booleans())
def test_random_tokens_equal_the_library(load_tokenizer: Load, name: str, seed: int, length: int, skip: bool) -> None:
    """Random tokens break characters in every way; ids beyond the vocabulary add nothing."""
    tokenizer = load_tokenizer(name)
    draw = random.Random(seed)
    broken = [i for i in range(tokenizer.vocab_size) if i < 400]  # many single bytes
    pool = [*range(tokenizer.vocab_size), tokenizer.vocab_size + 7]
    ids = [draw.choice(broken if draw.random() < 0.6 else pool) for _ in range(length)]
    deltas, _, _ = stream(tokenizer, chunks(ids, draw), skip_special_tokens=skip)
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3"])
@settings(max_examples=60)
@given(text=st.text(max_size=30), seed=st.integers(0, 2**32), skip=st.booleans())
def test_any_text_through_byte_fallback(load_tokenizer: Load, name: str, text: str, seed: int, skip: bool) -> None:
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(text)
    deltas, _, _ = stream(tokenizer, chunks(ids, random.Random(seed)), skip_special_tokens=skip)
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3"])
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), length=st.integers(0, 30))
def test_broken_characters_in_byte_fallback(load_tokenizer: Load, name: str, seed: int, length: int) -> None:
    """Invalid first bytes and truncated characters: one U+FFFD per byte, as in the library."""
    tokenizer = load_tokenizer(name)
    draw = random.Random(seed)
    byte = {tokenizer.token_bytes(i)[0]: i for i in range(3, 1100) if len(tokenizer.token_bytes(i)) == 1}
    words = tokenizer.encode(" verily I say", add_special_tokens=False)
    ids = []
    for _ in range(length):
        run = draw.choice([[0xFF], [0xC3], [0xE4, 0xBD], [0xF0, 0x9F, 0x99], [0x80, 0x80]])
        ids += [byte[value] for value in run] + draw.choices(words, k=draw.randrange(1, 3))
    deltas, _, _ = stream(tokenizer, chunks(ids, draw))
    assert "".join(deltas) == tokenizer.decode(ids)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), length=st.integers(0, 20), skip=st.booleans())
def test_word_pieces_equal_the_library(word_pieces: Tokenizer, seed: int, length: int, skip: bool) -> None:
    draw = random.Random(seed)
    ids = draw.choices(range(word_pieces.vocab_size), k=length)
    deltas, _, _ = stream(word_pieces, chunks(ids, draw), skip_special_tokens=skip)
    assert "".join(deltas) == word_pieces.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", NAMES)
def test_never_half_a_character(load_tokenizer: Load, name: str) -> None:
    """Emoji with joiners, CJK, combining marks: after every token the shown text is a prefix of the whole."""
    tokenizer = load_tokenizer(name)
    text = "naïve e\u0301 你好 👩\u200d👩\u200d👧 🇫🇷 नमस्ते שלום 한국어 𝔘𝔫𝔦"
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = tokenizer.decode(ids)
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    for token_id in ids:
        detokenizer.append([token_id])
        assert expected.startswith(detokenizer.text)
    assert detokenizer.text == expected  # every character is shown with its last token


@pytest.mark.parametrize("name", NAMES)
def test_unfinished_character_shows_at_the_end_only(load_tokenizer: Load, name: str) -> None:
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode("ok 𝔘", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    detokenizer.append(ids)
    assert "\ufffd" not in detokenizer.text
    detokenizer.append([], finished=True)
    assert detokenizer.text == tokenizer.decode(ids)
    assert detokenizer.text.endswith("\ufffd")


@pytest.mark.parametrize("name", NAMES)
def test_output_continues_the_prompt(load_tokenizer: Load, name: str) -> None:
    """Wherever a text is split into prompt and output, even inside a character, the output is the rest of the text."""
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode("To be, 你好 𝔘 or not")
    whole = tokenizer.decode(ids)
    for cut in range(len(ids)):
        deltas, _, _ = stream(tokenizer, [ids[cut:]], prompt=ids[:cut])
        before = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert before + "".join(deltas) == whole


def test_leading_space_goes_once(load_tokenizer: Load) -> None:
    tokenizer = load_tokenizer("mistral-v1")
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    bos = tokenizer.bos_token_id
    assert bos is not None
    assert stream(tokenizer, [hello], prompt=[])[0] == ["Hello"]
    assert stream(tokenizer, [hello], prompt=[bos])[0] == ["Hello"]
    assert stream(tokenizer, [hello], prompt=[bos], skip_special_tokens=False)[0] == [" Hello"]
    assert stream(tokenizer, [hello], prompt=hello)[0] == [" Hello"]


def test_special_tokens_show_on_request(load_tokenizer: Load, word_pieces: Tokenizer) -> None:
    tokenizer = load_tokenizer("qwen2.5")
    ids = tokenizer.encode("<|im_start|>a<|im_end|><tool_call>")
    assert "".join(stream(tokenizer, [ids])[0]) == "a<tool_call>"
    assert "".join(stream(tokenizer, [ids], skip_special_tokens=False)[0]) == "<|im_start|>a<|im_end|><tool_call>"
    ids = word_pieces.encode("to [SEP] [CLS] be", add_special_tokens=False)
    for spaces, expected in ((True, "to [SEP] [CLS] be"), (False, "to [SEP][CLS] be")):
        deltas, _, _ = stream(
            word_pieces, one_by_one(ids), skip_special_tokens=False, spaces_between_special_tokens=spaces
        )
        assert "".join(deltas) == expected


# --- stop strings -------------------------------------------------------------------------------------------------


def expected_stop(
    texts_per_token: list[str], stops: Sequence[str], min_tokens: int, include: bool
) -> tuple[str, object]:
    """The definition: read by character, the first stop string that is complete, the longest if several are."""
    text = ""
    for num_tokens, piece in enumerate(texts_per_token, start=1):
        for letter in piece:
            text += letter
            ended = [stop for stop in stops if text.endswith(stop)]
            if ended and num_tokens > min_tokens:
                stop = max(ended, key=len)
                return (text if include else text.removesuffix(stop)), StopMatch(stop, num_tokens)
    return text, None


@settings(max_examples=300)
@given(
    text=st.text(alphabet="ab\n", max_size=40),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4),
    min_tokens=st.integers(0, 4),
    include=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_stop_strings_follow_the_definition(
    load_tokenizer: Load, text: str, stops: list[str], min_tokens: int, include: bool, seed: int
) -> None:
    tokenizer = load_tokenizer("llama3-style-4k")
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected, match = expected_stop([tokenizer.id_to_text(i) for i in ids], stops, min_tokens, include)
    for chunked in (one_by_one(ids), chunks(ids, random.Random(seed))):
        _, detokenizer, found = stream(
            tokenizer,
            chunked,
            stop=stops,
            min_tokens=min_tokens,
            include_stop_str_in_output=include,
            max_tokens=None,
        )
        assert detokenizer.text == expected
        assert found == match


@settings(max_examples=200)
@given(
    stop=st.text(alphabet="ab", min_size=4, max_size=12),
    cuts=st.lists(st.integers(1, 12), max_size=12),
    min_tokens=st.integers(0, 12),
    seed=st.integers(0, 2**32),
)
@example(stop="abab", cuts=[4, 2], min_tokens=4, seed=0)
def test_near_misses_of_a_stop_string(
    load_tokenizer: Load, stop: str, cuts: list[int], min_tokens: int, seed: int
) -> None:
    """Texts made of prefixes of the stop string: part of a near miss may begin the real match."""
    tokenizer = load_tokenizer("llama3-style-4k")
    letters = {letter: tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab"}
    text = "".join(stop[:cut] for cut in cuts)
    expected, match = expected_stop(list(text), [stop], min_tokens, include=True)
    chunked = chunks([letters[letter] for letter in text], random.Random(seed))
    _, detokenizer, found = stream(
        tokenizer, chunked, stop=stop, min_tokens=min_tokens, include_stop_str_in_output=True, max_tokens=None
    )
    assert (detokenizer.text, found) == (expected, match)


@settings(max_examples=100)
@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1),
)
def test_as_little_as_possible_is_held_back(load_tokenizer: Load, text: str, stops: list[str]) -> None:
    """The held text is the longest suffix of the text that is a prefix of a stop string."""
    tokenizer = load_tokenizer("llama3-style-4k")
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=tuple(stops)))
    so_far = ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        if detokenizer.append([token_id]):
            return
        so_far += tokenizer.id_to_text(token_id)
        starts = {stop[:length] for stop in stops for length in range(1, len(stop))}
        held = max((start for start in starts if so_far.endswith(start)), key=len, default="")
        assert detokenizer.text == so_far.removesuffix(held)


def test_stop_across_tokens_and_characters(load_tokenizer: Load) -> None:
    tokenizer = load_tokenizer("gpt2")
    ids = tokenizer.encode("wait 🙂🙂 and more")
    deltas, _, match = stream(tokenizer, one_by_one(ids), stop="🙂 and")
    assert "".join(deltas) == "wait 🙂"
    assert match is not None
    assert match.stop == "🙂 and"
    assert tokenizer.decode(ids[: match.num_tokens]) == "wait 🙂🙂 and"


def test_nothing_follows_a_stop(load_tokenizer: Load) -> None:
    tokenizer = load_tokenizer("gpt2")
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop="b"))
    match = detokenizer.append(tokenizer.encode("a b c d"))
    assert match == StopMatch("b", 2)
    assert detokenizer.append(tokenizer.encode("e"), finished=True) == match
    assert (detokenizer.delta(), detokenizer.delta(), detokenizer.text) == ("a ", "", "a ")


def test_held_text_is_let_go_at_the_end(load_tokenizer: Load) -> None:
    tokenizer = load_tokenizer("gpt2")
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop="END."))
    assert detokenizer.append(tokenizer.encode("the EN")) is None
    assert detokenizer.delta() == "the "
    assert detokenizer.append([], finished=True) is None
    assert detokenizer.delta() == "EN"


# --- time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "mistral-v1"])
@pytest.mark.parametrize("kind", ["words", "one broken byte", "nearly a stop string"])
def test_takes_linear_time(load_tokenizer: Load, name: str, kind: str) -> None:
    tokenizer = load_tokenizer(name)
    stop = ""
    if kind == "words":
        ids = tokenizer.encode("so it goes on and on", add_special_tokens=False)
    elif kind == "one broken byte":
        ids = [next(i for i in range(1000) if tokenizer.token_bytes(i) == b"\x80")]
    else:
        ids, stop = tokenizer.encode("aaaa", add_special_tokens=False)[-1:], "a" * 1000 + "b"

    def seconds(length: int) -> float:
        times = []
        for _ in range(3):
            detokenizer = Detokenizer(tokenizer, SamplingParams(stop=stop or (), max_tokens=None))
            output = (ids * length)[:length]
            started = time.thread_time()
            for token_id in output:
                detokenizer.append([token_id])
                detokenizer.delta()
            times.append(time.thread_time() - started)
        return min(times)

    assert seconds(20_000) < 8 * seconds(5_000) + 0.02


def test_word_pieces_take_linear_time(word_pieces: Tokenizer) -> None:
    """The window over the last tokens stays small, even if a character never ends."""
    detokenizer = Detokenizer(word_pieces, SamplingParams())
    started = time.thread_time()
    for _ in range(5_000):
        detokenizer.append([1])
    assert time.thread_time() - started < 5
    assert detokenizer.text == " ".join(["to"] * 5_000)
