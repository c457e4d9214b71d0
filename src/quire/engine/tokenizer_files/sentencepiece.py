"""SentencePiece's models (tokenizer.model), read without the sentencepiece package.

The model is a protobuf message: pieces with scores and kinds, how text is normalised, and which algorithm joins pieces.
A text is encoded as SentencePiece encodes it, with differences that transformers makes as well. Control pieces are
recognised where a text spells them, as chat templates need, and every stretch of text between them has a dummy prefix
of its own, unless tokenizer_config.json says `legacy: false`. Where a model maps characters (NFKC), the library maps a
character together with its combining marks, and pieces that users defined are mapped as other text.
"""

import re
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from quire.engine.tokenizer_files.protobuf import Field, fields
from quire.errors import CheckpointError

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNREACHABLE = "\ue001"
"""Begins the texts that stand for unused pieces; from the private-use area, so that no text contains it by chance."""


@dataclass(slots=True)
class Piece:
    text: str = ""
    score: float = 0.0
    kind: int = _NORMAL


@dataclass(slots=True)
class SentencePieceModel:
    """The fields of a model that change how text is encoded; the numbers are those of sentencepiece_model.proto."""

    pieces: list[Piece]
    algorithm: int = _UNIGRAM
    byte_fallback: bool = False
    unknown_id: int = 0
    first_id: int = 1
    end_id: int = 2
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    whitespace_as_suffix: bool = False

    @staticmethod
    def parse(content: bytes) -> "SentencePieceModel":
        """Raises `ValueError` or `TypeError` for bytes that are no model."""
        model = SentencePieceModel([])
        for number, value in fields(content):
            if number == 1:
                model.pieces.append(_piece(_bytes(value)))
            elif number == 2:
                model._read_trainer(dict(fields(_bytes(value))))
            elif number == 3:
                model._read_normalizer(dict(fields(_bytes(value))))
        if not model.pieces:
            raise ValueError("it holds no pieces")
        return model

    def _read_trainer(self, spec: dict[int, Any]) -> None:
        self.algorithm = spec.get(3, _UNIGRAM)
        self.whitespace_as_suffix = bool(spec.get(24, False))
        self.byte_fallback = bool(spec.get(35, False))
        self.unknown_id, self.first_id, self.end_id = (_signed(spec.get(40 + i, i)) for i in range(3))

    def _read_normalizer(self, spec: dict[int, Any]) -> None:
        self.charsmap = spec.get(2, b"")
        self.add_dummy_prefix, self.remove_extra_whitespaces, self.escape_whitespaces = (
            bool(spec.get(number, True)) for number in (3, 4, 5)
        )


@cache
def _read_model(path: Path, changed: int) -> SentencePieceModel | None:
    """The model in a file; None if the file is no model. `changed`, the file's time, is part of the cache's key."""
    try:
        return SentencePieceModel.parse(path.read_bytes())
    except (ValueError, TypeError, AttributeError):
        return None


def is_sentencepiece(path: Path) -> bool:
    """Whether a file is SentencePiece's; tiktoken's has the same name."""
    return _read_model(path, path.stat().st_mtime_ns) is not None


def read_sentencepiece(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """A tokenizer with the ids of the model. Raises `CheckpointError` for algorithms that Quire does not know."""
    model = _read_model(path, path.stat().st_mtime_ns)
    if model is None:
        raise CheckpointError(f"{path} is no SentencePiece model")
    if model.algorithm not in (_UNIGRAM, _BPE):
        raise CheckpointError(f"{path}: model_type is {model.algorithm}; supported: 1 (unigram) and 2 (bpe)")
    if model.whitespace_as_suffix:
        raise CheckpointError(f"{path}: treat_whitespace_as_suffix is true; supported: false")
    return make_backend(path, model, settings)


def make_backend(path: Path, model: SentencePieceModel, settings: dict[str, Any]) -> Tokenizer:
    """A tokenizer with the ids of a model that was read from `path`. Raises `CheckpointError`."""
    if not 0 <= model.unknown_id < len(model.pieces):
        raise CheckpointError(f"{path}: unk_id is {model.unknown_id}; supported: a piece below {len(model.pieces)}")
    try:
        backend = Tokenizer(_bpe(model) if model.algorithm == _BPE else _unigram(model))
        backend.normalizer, backend.pre_tokenizer = _normalizer(model, settings), _pre_tokenizer(model, settings)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} is no usable SentencePiece model: {error}") from error
    backend.decoder = _decoder(model)
    control = [piece.text for piece in model.pieces if piece.kind in (_CONTROL, _UNKNOWN)]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return backend


def special_pieces(path: Path) -> dict[str, str]:
    """The names of chat templates for the model's own special pieces: {"bos_token": "<s>", …}."""
    model = _read_model(path, path.stat().st_mtime_ns)
    if model is None:
        return {}
    ids = {"unk_token": model.unknown_id, "bos_token": model.first_id, "eos_token": model.end_id}
    return {name: model.pieces[index].text for name, index in ids.items() if 0 <= index < len(model.pieces)}


def _bpe(model: SentencePieceModel) -> models.BPE:
    """Two neighbours merge if their text together is a normal piece, the highest score first."""
    normal = {piece.text: (-piece.score, index) for index, piece in enumerate(model.pieces) if piece.kind == _NORMAL}
    merges = [
        (text[:end], text[end:])
        for text in sorted(normal, key=normal.__getitem__)
        for end in range(1, len(text))
        if text[:end] in normal and text[end:] in normal
    ]
    return models.BPE(
        {_text_of(piece, index): index for index, piece in enumerate(model.pieces)},
        merges,
        unk_token=model.pieces[model.unknown_id].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=any(piece.kind == _USER_DEFINED for piece in model.pieces),
    )


def _unigram(model: SentencePieceModel) -> models.Unigram:
    vocab = [(_text_of(piece, index), piece.score) for index, piece in enumerate(model.pieces)]
    return models.Unigram(vocab, unk_id=model.unknown_id, byte_fallback=model.byte_fallback)


def _text_of(piece: Piece, index: int) -> str:
    """The text by which the library finds a piece; unused pieces are never found."""
    return f"{_UNREACHABLE}{index}" if piece.kind == _UNUSED else piece.text


def _normalizer(model: SentencePieceModel, settings: dict[str, Any]) -> normalizers.Normalizer:
    """Characters, spaces, the dummy prefix, and the mark of a space, in SentencePiece's order."""
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        ends = Regex(rf"\A +|[ {_SPACE}]+\z" if model.escape_whitespaces else r"\A +| +\z")
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix and _prefixes_every_stretch(settings):
        steps.append(normalizers.Prepend(_SPACE if model.escape_whitespaces else " "))
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _pre_tokenizer(model: SentencePieceModel, settings: dict[str, Any]) -> pre_tokenizers.PreTokenizer | None:
    """Pieces that users defined are cut out whole, the longest first, before others are joined."""
    steps: list[pre_tokenizers.PreTokenizer] = []
    if model.add_dummy_prefix and not _prefixes_every_stretch(settings):
        steps.append(pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=False))
    own = sorted({piece.text for piece in model.pieces if piece.kind == _USER_DEFINED}, key=len, reverse=True)
    if own:
        steps.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, own))), behavior="isolated"))
    return pre_tokenizers.Sequence(steps) if steps else None


def _prefixes_every_stretch(settings: dict[str, Any]) -> bool:
    return settings.get("legacy") is not False


def _decoder(model: SentencePieceModel) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _piece(message: bytes) -> Piece:
    piece = Piece()
    for number, value in fields(message):
        if number == 1:
            piece.text = _bytes(value).decode()
        elif number == 2:
            (piece.score,) = struct.unpack("<f", _bytes(value))
        elif number == 3:
            piece.kind = int(value)
    return piece


def _bytes(value: Field | int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a field that holds a message or a text is a number")
    return value


def _signed(value: int) -> int:
    """An int32 of protobuf, whose negative numbers are written with 64 bits."""
    return value - 2**64 if value >= 2**63 else value
