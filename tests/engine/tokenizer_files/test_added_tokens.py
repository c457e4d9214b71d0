"""Tokens named beside the tokenizer's own file, against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from quire.engine.tokenizer import Tokenizer
from quire.errors import CheckpointError
from tests.checkpoints import write_tokenizer

TEXT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think></s>"


def token(text: str, **flags: bool) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **flags}


CHATML = {
    "260": token("<|im_start|>", special=True),
    "261": token("<|im_end|>", special=True),
    "262": token("<think>", special=False),
}
NAMED = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}

FOLDERS: dict[str, dict[str, Any]] = {
    "config": {"tokenizer_config": {**NAMED, "added_tokens_decoder": CHATML}},
    "config without names": {"tokenizer_config": {"added_tokens_decoder": CHATML}},
    "named only": {"tokenizer_config": {**NAMED, "additional_special_tokens": ["<|im_start|>"]}},
    "named as objects": {"tokenizer_config": {**NAMED, "eos_token": {"__type": "AddedToken", **token("<|im_end|>")}}},
    "extra tokens": {"tokenizer_config": {**NAMED, "extra_special_tokens": ["<|im_start|>", "<think>"]}},
    "added_tokens.json": {
        "tokenizer_config": NAMED,
        "added_tokens": {"<|im_start|>": 260, "<|im_end|>": 261, "<think>": 262},
    },
    "special_tokens_map.json": {
        "special_tokens_map": {"eos_token": token("<|im_end|>"), "additional_special_tokens": ["<|im_start|>"]}
    },
    "map and added": {
        "special_tokens_map": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]},
        "added_tokens": {"<|im_start|>": 260, "<|im_end|>": 261, "<think>": 262},
    },
    "known already": {"tokenizer_config": {**NAMED, "added_tokens_decoder": {"257": token("<s>", special=True)}}},
    "strips": {
        "tokenizer_config": {"added_tokens_decoder": {"260": token("Hi", special=True, lstrip=True, rstrip=True)}}
    },
    "bos": {"tokenizer_config": {**NAMED, "add_bos_token": True}},
    "no bos": {"tokenizer_config": {**NAMED, "add_bos_token": False, "add_eos_token": False}},
    "eos": {"tokenizer_config": {**NAMED, "add_eos_token": True}},
    "bos and eos": {"tokenizer_config": {**NAMED, "add_bos_token": True, "add_eos_token": True}},
}

SHOWN_BY_TRANSFORMERS = {"named as objects", "map and added"}
"""Folders whose named tokens transformers does not hide, since an object without `special` names them, or since
added_tokens.json gives them again. Quire hides every token that is named as special."""


def write(folder: Path, files: dict[str, Any]) -> None:
    write_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", FOLDERS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    write(tmp_path, FOLDERS[name])
    expected, found = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
    ids = expected(TEXT)["input_ids"]
    assert found.encode(TEXT) == ids
    assert found.encode(TEXT, add_special_tokens=False) == expected(TEXT, add_special_tokens=False)["input_ids"]
    if name not in SHOWN_BY_TRANSFORMERS:
        assert found.decode(ids) == expected.decode(ids, skip_special_tokens=True)
    assert found.vocab_size == len(expected)
    assert (found.bos_token_id, found.eos_token_id) == (expected.bos_token_id, expected.eos_token_id)


def test_an_id_in_the_files_is_the_tokens_id(tmp_path: Path) -> None:
    """transformers would give the next free id, 260."""
    write(tmp_path, {"tokenizer_config": {"added_tokens_decoder": {"270": token("<|im_start|>", special=True)}}})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<|im_start|>") == [270]
    assert tokenizer.added_tokens[265] == "<|reserved_token_265|>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": []}, r"tokenizer_config\.json holds a JSON list"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, r"added_tokens_decoder is \[1\]; supported: an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, r"added_tokens_decoder\.x is \{\}; supported"),
        ({"tokenizer_config": {"added_tokens_decoder": {"5": "a"}}}, r'added_tokens_decoder\.5 is "a"; supported'),
        ({"tokenizer_config": {"additional_special_tokens": 5}}, "additional_special_tokens is 5; supported: a list"),
        ({"tokenizer_config": {"extra_special_tokens": [[]]}}, r"extra_special_tokens is \[\[\]\]; supported: a list"),
        ({"added_tokens": {"a": "b"}}, r'added_tokens\.json: a is "b"; supported: a token id'),
        ({"special_tokens_map": 5}, r"special_tokens_map\.json holds a JSON int"),
    ],
)
def test_wrong_types_are_named(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, files)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(tmp_path)
