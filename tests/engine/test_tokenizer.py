"""Tokenizer against published encodings, and its errors for unusable files and texts."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from quire.engine.tokenizer import PieceRules, Tokenizer, read_special_tokens
from quire.errors import CheckpointError, RequestError

DATA = Path(__file__).parents[1] / "data" / "tokenizers"
NAMES = sorted(folder.name for folder in DATA.iterdir())

Load = Callable[[str], Tokenizer]
Folder = Callable[[str], Path]


def vectors(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name / "vectors.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_encodes_as_published(load_tokenizer: Load, name: str) -> None:
    tokenizer = load_tokenizer(name)
    for row in vectors(name):
        assert tokenizer.encode(row["text"]) == row["ids"], row["id"]


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_the_tokens_add_up_to_the_text(load_tokenizer: Load, name: str) -> None:
    tokenizer = load_tokenizer(name)
    assert tokenizer.pieces is not None
    for row in vectors(name):
        ids = [token_id for token_id in row["ids"] if token_id not in tokenizer.special_ids]
        spelled = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert spelled.removeprefix(tokenizer.pieces.strip_start) == tokenizer.decode(row["ids"]), row["id"]


@pytest.mark.parametrize("name", NAMES)
def test_every_token_is_spelled_as_the_library_decodes_it(load_tokenizer: Load, name: str) -> None:
    """In the middle of a text, where no leading space is stripped. Tokens with part of a character are left out."""
    tokenizer = load_tokenizer(name)
    anchor = tokenizer.encode("a", add_special_tokens=False)
    before = tokenizer.decode(anchor)
    step = max(1, tokenizer.vocab_size // 5000)
    for token_id in [*range(0, tokenizer.vocab_size, step), *tokenizer.added_tokens]:
        text = tokenizer.decode([*anchor, token_id], skip_special_tokens=False).removeprefix(before)
        if "\ufffd" not in text:
            assert tokenizer.id_to_text(token_id) == text


def test_special_tokens_and_sizes(load_tokenizer: Load) -> None:
    qwen = load_tokenizer("qwen2.5")
    assert qwen.vocab_size == 151_665
    assert (qwen.bos_token_id, qwen.eos_token_id) == (None, 151_645)
    assert qwen.encode("<|im_start|>user") == [151_644, 872]
    assert 151_644 in qwen.special_ids
    assert qwen.added_tokens[151_657] == "<tool_call>"
    assert 151_657 not in qwen.special_ids  # added, yet part of the text
    mistral = load_tokenizer("mistral-v1")
    assert (mistral.bos_token_id, mistral.eos_token_id) == (1, 2)
    assert mistral.encode("Hi", add_special_tokens=False) == mistral.encode("Hi")[1:]
    assert mistral.decode(mistral.encode("Hi"), skip_special_tokens=False) == "<s> Hi"


def test_ids_shown_alone(load_tokenizer: Load) -> None:
    gpt2, mistral = load_tokenizer("gpt2"), load_tokenizer("mistral-v1")
    assert gpt2.id_to_text(995) == " world"
    assert gpt2.token_bytes(gpt2.encode("🙂")[0]) == b"\xf0\x9f"
    assert gpt2.id_to_text(gpt2.encode("🙂")[0]) == "\ufffd"
    assert mistral.id_to_text(mistral.encode("Hello")[1]) == " Hello"
    assert mistral.token_bytes(mistral.encode("🙂")[-1]) != b""
    assert gpt2.token_bytes(10**9) == b""
    assert gpt2.token_bytes(50_256) == b"<|endoftext|>"


def test_added_token_with_a_space_is_spelled_plainly(load_tokenizer: Load, tokenizer_folder: Folder) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_folder("llama3-style-4k") / "tokenizer.json"))
    backend.add_special_tokens(["<|two words|>"])
    tokenizer = Tokenizer(backend, {})
    token_id = backend.token_to_id("<|two words|>")
    assert tokenizer.id_to_text(token_id) == "<|two words|>" == tokenizer.decode([token_id], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("decoder", "rules"),
    [
        (None, None),
        (decoders.ByteLevel(), PieceRules(byte_level=True)),
        (decoders.Metaspace(), PieceRules(replacements=(("▁", " "),), strip_start=" ")),
        (decoders.Metaspace(prepend_scheme="never"), PieceRules(replacements=(("▁", " "),))),
        (decoders.WordPiece(), None),
        (
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
            PieceRules(byte_tokens=True, replacements=(("▁", " "),)),
        ),
        (decoders.Sequence([decoders.ByteFallback(), decoders.CTC()]), None),
    ],
)
def test_rules_are_read_from_the_decoder(decoder: decoders.Decoder | None, rules: PieceRules | None) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    if decoder is not None:
        backend.decoder = decoder
    assert Tokenizer(backend, {}).pieces == rules


def test_truncation_and_padding_of_the_file_are_off(tokenizer_folder: Folder) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_folder("llama3-style-4k") / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    tokenizer = Tokenizer(backend, {})
    assert len(tokenizer.encode("to be or not to be that is the question")) > 4
    assert len(tokenizer.encode("to")) < 4


def test_prompt_length_is_limited(load_tokenizer: Load, tokenizer_folder: Folder) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder("llama3-style-4k"), max_prompt_chars=10)
    assert tokenizer.encode("0123456789")
    with pytest.raises(RequestError, match="11 characters; at most 10"):
        tokenizer.encode("0123456789x")


@pytest.mark.parametrize("name", ["gpt2", "mistral-v1"])
@pytest.mark.parametrize("unit", ["a", " ", "a b", "你", "🙂"])
def test_tokenising_takes_linear_time(load_tokenizer: Load, name: str, unit: str) -> None:
    """Also texts without a place to split. The bound of 8 for four times the text leaves room for noise."""
    tokenizer = load_tokenizer(name)

    def seconds(length: int) -> float:
        text = unit * length
        times = []
        for _ in range(3):
            started = time.perf_counter()
            tokenizer.encode(text)
            times.append(time.perf_counter() - started)
        return min(times)

    assert seconds(40_000) < 8 * seconds(10_000) + 0.05


def test_surrogates_are_refused(load_tokenizer: Load) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        load_tokenizer("gpt2").encode("a\ud800")


def test_missing_file_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}', "\udcff"]
)
def test_corrupt_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is (not a tokenizer|empty)"):
        Tokenizer.from_folder(tmp_path)


def test_special_tokens_come_from_either_file(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "<old>"}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": null, "add_bos_token": true}')
    assert read_special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read as JSON"):
        read_special_tokens(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a JSON list"):
        read_special_tokens(tmp_path)


def test_threads_share_one_tokenizer(tokenizer_folder: Folder) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder("llama3-style-4k"))
    text = "Now is the winter of our discontent, ça va? 🙂\n" * 20
    ids = tokenizer.encode(text)
    failures: list[object] = []

    def work() -> None:
        for _ in range(20):
            spelled = b"".join(map(tokenizer.token_bytes, ids[1:])).decode()
            if tokenizer.encode(text) != ids or spelled != text:
                failures.append(spelled)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_imports_neither_torch_nor_numpy() -> None:
    program = (
        "import sys, quire.engine.tokenizer, quire.engine.detokenizer, quire.engine.chat_template\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
