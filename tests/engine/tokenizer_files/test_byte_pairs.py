"""tiktoken files, tekken.json and GPT-2's files against the tiktoken package and transformers."""

import base64
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tiktoken._educational import SimpleBytePairEncoding
from transformers import AutoTokenizer

from quire.engine.tokenizer import Tokenizer
from quire.engine.tokenizer_files.byte_pairs import CL100K
from quire.errors import CheckpointError

DATA = Path(__file__).parents[2] / "data"
LETTERS = r"[^\r\n\p{L}\p{N}]?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    # As the families' own code has them.
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    "kimi": "|".join(
        [
            r"[\p{Han}]+",
            f"{LETTERS}{UPPER}*{LOWER}+{ENDINGS}?",
            f"{LETTERS}{UPPER}+{LOWER}*{ENDINGS}?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
}
TEXTS = [
    *("", " ", "  \n ", "Hello world", "HTTPServer camelCase", "you'LL don't I'm", "1234567 12.5", "a\tb\r\n\r\nc"),
    *("你好世界abc你", "naïve ÉTÉ", "🙂🙃 x", "e\u0301a", "   leading", "trailing   ", "!!! ...\n\n", "\u00a0x\u3000y"),
]


@cache
def ranks() -> dict[bytes, int]:
    text = (DATA / "held_out.txt").read_text(encoding="utf-8")[:2500] + " 你好世界 你好 1234 1234 HTTPServer "
    return SimpleBytePairEncoding.train(text, 400, CL100K).mergeable_ranks  # type: ignore[no-any-return]


def write_ranks(path: Path) -> None:
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks().items()]
    path.write_bytes(b"\n".join(lines) + b"\n")


FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama3": ("tokenizer.model", {"model_type": "llama"}, {}),
    "qwen": ("qwen.tiktoken", {"model_type": "qwen"}, {"tokenizer_class": "QWenTokenizer"}),
    "kimi": ("tiktoken.model", {"model_type": "kimi_k2"}, {"tokenizer_class": "TikTokenTokenizer"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_tiktoken(family: str, tmp_path: Path) -> None:
    file, config, settings = FAMILIES[family]
    write_ranks(tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = {**settings, "added_tokens_decoder": {"401": {"content": "<|end|>", "special": True}}}
    if family != "qwen":  # whose control tokens are known
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    control = {"<|endoftext|>": 400, "<|im_start|>": 401} if family == "qwen" else {"<|end|>": 401}
    expected = tiktoken.Encoding(family, pat_str=PATTERNS[family], mergeable_ranks=ranks(), special_tokens=control)
    found = Tokenizer.from_folder(tmp_path)
    for text in [*TEXTS, *(f"{text}{special}{text}" for text in TEXTS[:6] for special in control)]:
        ids = expected.encode(text, allowed_special="all")
        assert found.encode(text) == ids, text
        assert found.decode(ids, skip_special_tokens=False) == text
    assert control.keys() <= {found.added_tokens[token_id] for token_id in found.special_ids}


def test_llama_3_without_names_has_its_published_control_tokens(tmp_path: Path) -> None:
    lines = [base64.b64encode(bytes([rank])) + b" %d" % rank for rank in range(256)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join([*lines, base64.b64encode(b"the") + b" 127999"]))
    tokenizer = Tokenizer.from_folder(tmp_path)
    published = {128_000: "<|begin_of_text|>", 128_006: "<|start_header_id|>", 128_009: "<|eot_id|>"}
    assert {token_id: tokenizer.added_tokens[token_id] for token_id in published} == published
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, max(tokenizer.added_tokens)) == (128_000, 128_001, 128_255)


@pytest.mark.parametrize("lists", [True, False])
def test_tekken(lists: bool, tmp_path: Path) -> None:
    tokens = sorted(ranks(), key=ranks().__getitem__)
    content: dict[str, Any] = {
        "config": {"pattern": PATTERNS["kimi"], "default_vocab_size": 380, "default_num_special_tokens": 30},
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for rank, token in enumerate(tokens)],
    }
    if lists:
        content["special_tokens"] = [{"rank": 1, "token_str": "<s>"}, {"rank": 3, "token_str": "[INST]"}]
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    kept = {token: rank for token, rank in ranks().items() if rank < 350}
    expected = tiktoken.Encoding("tekken", pat_str=PATTERNS["kimi"], mergeable_ranks=kept, special_tokens={})
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == [30 + rank for rank in expected.encode(text)]
    assert tokenizer.encode("[INST]<s>", add_special_tokens=False) == [3, 1]
    assert (tokenizer.bos_token_id, tokenizer.added_tokens[29]) == (1, "<SPECIAL_29>")
    assert tokenizer.added_tokens[9] == ("<SPECIAL_9>" if lists else "[TOOL_CALLS]")


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocab_and_merges(tokenizer_class: str, tmp_path: Path, tokenizer_folder: Callable[[str], Path]) -> None:
    whole = json.loads((tokenizer_folder("gpt2") / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in whole["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": tokenizer_class, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found, expected = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert found.encode(text) == expected(text)["input_ids"], text
    assert found.eos_token_id == expected.eos_token_id


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.tiktoken", "YQ== 0\nb", "a.tiktoken is neither a SentencePiece model nor a tiktoken file"),
        ("a.tiktoken", "YQ== x", "a.tiktoken is neither"),
        ("tekken.json", "[]", r"tekken\.json holds a JSON list"),
        ("tekken.json", "{}", r"tekken\.json is no tekken\.json of Mistral"),
        ("tekken.json", '{"config": {"default_num_special_tokens": "x"}}', r"is no tekken\.json"),
        ("vocab.json", "{}", r"merges\.txt is missing; vocab\.json needs it"),
    ],
)
def test_unusable_files(file: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(tmp_path)
