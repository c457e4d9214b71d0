"""vocab.txt: BERT's vocabulary of word pieces, a token a line."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from quire.errors import CheckpointError

_NAMES = {
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}


def read_vocab_txt(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """Raises `CheckpointError` for a vocabulary without BERT's special tokens."""
    lines = path.read_text(encoding="utf-8").split("\n")
    vocab = {line.rstrip("\r"): token_id for token_id, line in enumerate(lines) if line}
    tokens = {name: _text(settings.get(name)) or usual for name, usual in _NAMES.items()}
    for name in ("unk_token", "cls_token", "sep_token"):
        if tokens[name] not in vocab:
            raise CheckpointError(f"{path} does not hold {tokens[name]!r}, the {name}; supported: word pieces of BERT")
    backend = Tokenizer(models.WordPiece(vocab, unk_token=tokens["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case") is not False,
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars") is not False,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    first, last = tokens["cls_token"], tokens["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(text, vocab[text]) for text in (first, last)],
    )
    backend.add_special_tokens([text for text in tokens.values() if text in vocab])
    return backend


def _text(token: Any) -> str | None:
    """A token as tokenizer_config.json writes it: a text, or an object with one."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
