"""tokenizer.model against the sentencepiece package, with models trained on a page of text."""

import contextlib
import io
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from quire.engine.tokenizer import Tokenizer
from quire.engine.tokenizer_files.protobuf import fields
from quire.engine.tokenizer_files.sentencepiece import SentencePieceModel, is_sentencepiece
from quire.errors import CheckpointError

TEXT = (Path(__file__).parents[2] / "data" / "held_out.txt").read_text(encoding="utf-8")[:12_000]
LINES = [*TEXT.splitlines(), "ça va? 你好世界 naïve 100 20,000 ﬁne Ⅷ tabs\there 🙂"]
LETTERS = [*"abcdeTHE the  .,!?0123456789éçñ你好世🙂ﬁⅧ①ü한글カ�", "▁", "\n", "\t", "<tool>", "foo"]
EDGES = ["", " ", "   ", " a", "a ", "a  b", "▁a", "a▁", "Hello world", "🙂🙃", "don't stop", "x" * 50, "  12 34  "]

MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "llama": {
        "normalization_rule_name": "identity",
        "byte_fallback": True,
        "split_digits": True,
        "remove_extra_whitespaces": False,
    },
    "gemma": {
        "normalization_rule_name": "identity",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["▁▁", "▁▁▁", "\n", "\n\n", "<tool>"],
    },
    "bytes": {"byte_fallback": True},
    "no prefix": {"add_dummy_prefix": False},
    "every space": {"remove_extra_whitespaces": False},
    "case folded": {"normalization_rule_name": "nfkc_cf"},
    "own pieces": {"user_defined_symbols": ["foo", "the"], "control_symbols": ["<ctl>"]},
    "own ids": {"unk_id": 3, "bos_id": 2, "eos_id": 1, "pad_id": 0, "bos_piece": "<bos>", "eos_piece": "<eos>"},
    "no ends": {"bos_id": -1, "eos_id": -1},
}


def train(folder: Path, algorithm: str = "bpe", **options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=500,
        model_type=algorithm,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def texts() -> list[str]:
    choices = random.Random(0)
    return [*EDGES, *LINES[:20], *("".join(choices.choices(LETTERS, k=choices.randrange(1, 25))) for _ in range(150))]


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_sentencepiece(name: str, algorithm: str, tmp_path: Path) -> None:
    expected, found = train(tmp_path, algorithm, **MODELS[name]), Tokenizer.from_folder(tmp_path)
    assert found.vocab_size == expected.vocab_size()
    assert found.bos_token_id == (expected.bos_id() if expected.bos_id() >= 0 else None)
    assert found.eos_token_id == (expected.eos_id() if expected.eos_id() >= 0 else None)
    for text in texts():
        ids = expected.encode(text)
        assert found.encode(text, add_special_tokens=False) == ids, text
        if expected.unk_id() not in ids and not text.startswith("▁"):
            assert found.decode(ids) == expected.decode(ids), text


def test_pieces_join_to_the_text(tmp_path: Path) -> None:
    """What the detokenizer relies on."""
    train(tmp_path, **MODELS["llama"])
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.pieces is not None
    assert tokenizer.pieces.byte_tokens
    ids = tokenizer.encode("Hi 🙂 你 there", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == " Hi 🙂 你 there"


def test_control_pieces_are_recognised_and_hidden(tmp_path: Path) -> None:
    expected = train(tmp_path, **MODELS["own pieces"])
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("a<ctl>b</s>")
    control = expected.piece_to_id("<ctl>")
    assert ids[0] == expected.bos_id()
    assert (control in ids, ids[-1]) == (True, expected.eos_id())
    assert tokenizer.decode(ids) == "a b"  # the prefix of the second stretch, as transformers writes it
    assert control in tokenizer.special_ids


@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"legacy": False}, {"add_bos_token": False}])
def test_settings_of_the_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    expected = train(tmp_path, **MODELS["llama"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_folder(tmp_path)
    begins = [] if settings.get("add_bos_token") is False else [1]
    assert tokenizer.encode("the cat") == [*begins, *expected.encode("the cat")]
    second = "cat" if settings.get("legacy") is False else "▁cat"
    after = tokenizer.encode("the</s>cat")[tokenizer.encode("the</s>cat").index(2) + 1 :]
    assert "".join(map(expected.id_to_piece, after)) == second


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content


class TestUnusableFiles:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty; download the file again"),
            (b"hello there", "neither a SentencePiece model nor a tiktoken file"),
            (b"\x0a\xff\xff\xff\xff\x7f", "neither a SentencePiece model nor a tiktoken file"),
            (b"\xff" * 20, "neither a SentencePiece model nor a tiktoken file"),
            (
                field(1, field(1, b"a")) + field(2, b"\x18\x03"),
                r"model_type is 3; supported: 1 \(unigram\) and 2 \(bpe\)",
            ),
            (field(1, field(1, b"a")) + field(2, b"\xc0\x02\x07"), "unk_id is 7; supported: a piece below 1"),
            (
                field(1, field(1, b"a")) + field(2, b"\xc0\x01\x01" + b"\xc0\x02\x00"),
                "treat_whitespace_as_suffix is true; supported: false",
            ),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of git-lfs"),
        ],
    )
    def test_are_refused(self, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_folder(tmp_path)

    def test_damaged_models_raise_nothing_else(self, tmp_path: Path) -> None:
        train(tmp_path)
        path = tmp_path / "tokenizer.model"
        whole, choices = path.read_bytes(), random.Random(0)
        for _ in range(40):
            damaged = bytearray(whole[: choices.randrange(len(whole))])
            for _ in range(3):
                damaged[choices.randrange(len(damaged))] = choices.randrange(256)
            path.write_bytes(damaged)
            with contextlib.suppress(CheckpointError):
                Tokenizer.from_folder(tmp_path)


def test_protobuf_fields() -> None:
    message = b"\x08\x96\x01" + b"\x15" + struct.pack("<f", 1.5) + b"\x1a\x02ab" + b"\x21" + bytes(8)
    assert list(fields(message)) == [(1, 150), (2, struct.pack("<f", 1.5)), (3, b"ab"), (4, bytes(8))]
    for broken in (b"\x08", b"\x1a\x05ab", b"\x0b", b"\x00\x00", b"\x08" + b"\xff" * 10):
        with pytest.raises(ValueError, match=r"."):
            list(fields(broken))


def test_negative_ids_are_read(tmp_path: Path) -> None:
    train(tmp_path, **MODELS["no ends"])
    model = SentencePieceModel.parse((tmp_path / "tokenizer.model").read_bytes())
    assert (model.first_id, model.end_id) == (-1, -1)
    assert is_sentencepiece(tmp_path / "tokenizer.model")
