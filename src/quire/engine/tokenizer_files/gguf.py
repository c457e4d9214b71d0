"""The tokenizer of a GGUF file: its metadata hold the vocabulary, merges or scores, and the chat template."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from quire.engine.tokenizer_files.cuts import CUTS, Cut
from quire.engine.tokenizer_files.sentencepiece import Piece, SentencePieceModel, make_backend
from quire.errors import CheckpointError
from quire.gguf.file import GgufFile, read_gguf

_PREFIX = "tokenizer.ggml."
_CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 3, 4, 5, 6
_NORMAL = 1
_BPE = 2
_MODELS = ("gpt2", "llama")
_TEMPLATE = "tokenizer.chat_template"
_HUGGING_FACE = "tokenizer.huggingface.json"
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_UNREACHABLE = "\ue001"
"""Begins the texts that stand for unused tokens; from the private-use area, so that no text contains it by chance."""
_SPACE = "▁"


def read_gguf_tokenizer(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """Raises `CheckpointError` for a kind of tokenizer that Quire does not know."""
    file = read_gguf(path)
    if _HUGGING_FACE in file.metadata:
        try:
            return Tokenizer.from_str(file.text(_HUGGING_FACE))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path}: {_HUGGING_FACE} cannot be read: {error}") from error
    kind = file.text(f"{_PREFIX}model")
    if kind not in _MODELS:
        raise file.refusal(f"{_PREFIX}model", " and ".join(_MODELS))
    return _byte_pairs(file) if kind == "gpt2" else _sentencepiece(file, settings)


def gguf_settings(path: Path) -> dict[str, Any]:
    """What tokenizer_config.json would hold: named tokens, whether they are put around texts, and the chat template."""
    file = read_gguf(path)
    tokens = file.texts(f"{_PREFIX}tokens")
    settings: dict[str, Any] = {}
    for name, key in _NAMED.items():
        if f"{_PREFIX}{key}" in file.metadata:
            index = file.integer(f"{_PREFIX}{key}", minimum=0)
            if index >= len(tokens):
                raise file.refusal(f"{_PREFIX}{key}", f"a token below {len(tokens)}")
            settings[name] = tokens[index]
    is_llama = file.metadata.get(f"{_PREFIX}model") == "llama"
    adds_first = is_llama or CUTS.get(str(file.metadata.get(f"{_PREFIX}pre")), CUTS["default"]).adds_first
    settings["add_bos_token"] = file.flag(f"{_PREFIX}add_bos_token", adds_first)
    settings["add_eos_token"] = file.flag(f"{_PREFIX}add_eos_token", False)
    templates = {
        key.removeprefix(_TEMPLATE).removeprefix(".") or "default": file.text(key)
        for key in file.metadata
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")
    }
    if templates:
        settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return settings


def _tokens_and_kinds(file: GgufFile) -> tuple[list[str], list[int]]:
    tokens = file.texts(f"{_PREFIX}tokens")
    if not tokens:
        raise file.refusal(f"{_PREFIX}tokens", "the texts of all tokens")
    if f"{_PREFIX}token_type" not in file.metadata:
        return tokens, [_NORMAL] * len(tokens)
    return tokens, [int(kind) for kind in file.numbers(f"{_PREFIX}token_type", len(tokens)).tolist()]


def _byte_pairs(file: GgufFile) -> Tokenizer:
    tokens, kinds = _tokens_and_kinds(file)
    cut = _cut(file)
    vocab: dict[str, int] = {}
    for index, text in enumerate(tokens):
        # A text that is twice in the vocabulary stands for its first token.
        vocab[f"{_UNREACHABLE}{index}" if text in vocab or kinds[index] == _UNUSED else text] = index
    merges = [_halves(file, merge) for merge in file.texts(f"{_PREFIX}merges")]
    try:
        backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=cut.ignores_merges))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file.path}: {_PREFIX}merges do not fit {_PREFIX}tokens: {error}") from error
    set_cut(backend, cut)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(text, special=kind == _CONTROL, normalized=False)
            for text, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED) and text
        ]
    )
    return backend


def set_cut(backend: Tokenizer, cut: Cut) -> None:
    """Let a byte-level tokenizer cut texts so."""
    backend.model.ignore_merges = cut.ignores_merges
    backend.normalizer = normalizers.NFC() if cut.composes else None
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in cut.patterns]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])


def _cut(file: GgufFile) -> Cut:
    name = file.text(f"{_PREFIX}pre", "default")
    if name not in CUTS:
        raise file.refusal(f"{_PREFIX}pre", ", ".join(CUTS))
    return CUTS[name]


def _halves(file: GgufFile, merge: str) -> tuple[str, str]:
    at = merge.find(" ", 1)
    if at < 0:
        raise CheckpointError(f"{file.path}: {_PREFIX}merges has {merge[:100]!r}; supported: two texts and a space")
    return merge[:at], merge[at + 1 :]


def _sentencepiece(file: GgufFile, settings: dict[str, Any]) -> Tokenizer:
    tokens, kinds = _tokens_and_kinds(file)
    scores = file.numbers(f"{_PREFIX}scores", len(tokens)).tolist()
    unknown = file.integer(f"{_PREFIX}unknown_token_id", 0, minimum=0)
    pieces = [
        Piece(text.replace(" ", _SPACE) if kind == _USER_DEFINED else text, score, kind)
        for text, score, kind in zip(tokens, scores, kinds, strict=True)
    ]
    model = SentencePieceModel(
        pieces,
        algorithm=_BPE,
        byte_fallback=_BYTE in kinds,
        unknown_id=unknown,
        add_dummy_prefix=file.flag(f"{_PREFIX}add_space_prefix", True),
        remove_extra_whitespaces=file.flag(f"{_PREFIX}remove_extra_whitespaces", False),
    )
    return make_backend(file.path, model, settings)
