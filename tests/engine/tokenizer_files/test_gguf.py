"""Tokenizers from GGUF metadata: the ids of the originals, on the reference texts of six tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from quire.engine.chat_template import ChatTemplate
from quire.engine.tokenizer import Tokenizer
from quire.errors import CheckpointError

TEXTS = [
    "Hello world",
    "  two  spaces\n\nand lines\t\ttabs",
    "It's 2024, isn't it? 1234567 + 89 = x;",
    "Grüße, 日本語 שלום e\u0301 🙂",
    "<|im_start|>user\nhi<|im_end|>",
    "",
]


def write(path: Path, **values: Any) -> Path:
    """A file of metadata alone; "pre" stands for tokenizer.ggml.pre."""
    writer = GGUFWriter(path, "llama")
    for key, value in values.items():
        name = key.replace("__", ".") if "__" in key else f"tokenizer.ggml.{key}"
        match value:
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case str():
                writer.add_string(name, value)
            case _:
                writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level(cut: Any) -> dict[str, Any]:
    """A small byte-level BPE as the library trains it, with two control tokens and one that a user defined."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    state: dict[str, Any] = json.loads(backend.to_str())
    return state


def values_of(state: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp's converter writes of a byte-level tokenizer.json."""
    added = {token["id"]: token["content"] for token in state["added_tokens"]}
    vocab = {index: text for text, index in state["model"]["vocab"].items()} | added
    return {
        "model": "gpt2",
        "tokens": [vocab[index] for index in range(len(vocab))],
        "token_type": [int(TokenType.CONTROL if index in added else TokenType.NORMAL) for index in range(len(vocab))],
        "merges": [" ".join(merge) for merge in state["model"]["merges"]],
    }


def test_byte_level_bpe(tmp_path: Path) -> None:
    state = byte_level(pre_tokenizers.Digits(individual_digits=True))
    path = write(
        tmp_path / "m.gguf", pre="smollm", eos_token_id=len(values_of(state)["tokens"]) - 1, **values_of(state)
    )
    tokenizer, original = Tokenizer.from_folder(path), Backend.from_str(json.dumps(state))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == original.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.encode("<|im_start|>") == [len(state["model"]["vocab"])]


SPM = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h", "hi", "▁hi", "  "]


@pytest.mark.parametrize(
    ("add_space_prefix", "expected"), [(True, ["<s>", "▁hi", "▁", "hi"]), (False, ["<s>", "hi", "▁", "hi"])]
)
def test_sentencepiece(add_space_prefix: bool, expected: list[str], tmp_path: Path) -> None:
    kinds = [2, 3, 3, *[6] * 256, *[1] * 6, 4]
    scores = [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, 0.0]
    path = write(
        tmp_path / "m.gguf",
        model="llama",
        tokens=SPM,
        token_type=kinds,
        scores=scores,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        add_space_prefix=add_space_prefix,
    )
    tokenizer = Tokenizer.from_folder(path)
    # Scores decide: h and i join before the space and h do.
    ids = tokenizer.encode("hi hi")
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "hi hi"
    assert tokenizer.decode(tokenizer.encode("a  é")) == "a  é"
    assert SPM.index("  ") in tokenizer.encode("a  é")


def test_chat_templates_and_named_tokens(tmp_path: Path) -> None:
    state = byte_level(pre_tokenizers.Digits(individual_digits=True))
    template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    path = write(
        tmp_path / "m.gguf",
        pre="gpt-2",
        bos_token_id=0,
        **values_of(state),
        tokenizer__chat_template=template,
        tokenizer__chat_template__tool_use="tools",
    )
    rendered = ChatTemplate.from_folder(path)
    first = values_of(state)["tokens"][0]
    messages = [{"role": "user", "content": "x"}]
    assert rendered.render(messages) == f"{first}[x]"
    assert rendered.render(messages, tools=[{"type": "function"}]) == "tools"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": "bert", "tokens": ["a"]}, "tokenizer.ggml.model is 'bert'; supported: gpt2 and llama"),
        ({"model": "gpt2", "tokens": ["a"], "pre": "new"}, "tokenizer.ggml.pre is 'new'; supported: default, "),
        ({"model": "gpt2", "tokens": ["a"], "merges": ["ab"]}, "merges has 'ab'; supported: two texts and a space"),
        ({"model": "gpt2", "tokens": ["a"], "merges": ["a b"]}, "merges do not fit"),
        ({"model": "gpt2", "tokens": ["a"], "bos_token_id": 7}, "bos_token_id is 7; supported: a token below 1"),
        ({"model": "gpt2", "tokens": ["a"], "token_type": [1, 1]}, "supported: an array of 1 numbers"),
        ({"model": "llama", "tokens": ["a"]}, "tokenizer.ggml.scores is missing"),
        ({"model": "gpt2"}, "tokenizer.ggml.tokens is missing"),
    ],
)
def test_what_is_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        Tokenizer.from_folder(write(tmp_path / "m.gguf", **values))
