"""The files that tokenizers come in, read into objects of the `tokenizers` library.

`read_backend` takes the first row of TOKENIZER_FILES that fits a folder. A row is a kind of file and the function that
reads it. What tokenizer_config.json and its kin say about special tokens is added to every kind (`added_tokens`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from quire.engine.tokenizer_files.byte_pairs import read_tekken, read_tiktoken, read_vocab_and_merges
from quire.engine.tokenizer_files.gguf import read_gguf_tokenizer
from quire.engine.tokenizer_files.sentencepiece import is_sentencepiece, read_sentencepiece
from quire.engine.tokenizer_files.tokenizer_json import read_tokenizer_json
from quire.engine.tokenizer_files.word_pieces import read_vocab_txt
from quire.gguf.file import is_gguf
from quire.model_config.file_kinds import is_file

Read = Callable[[Path, dict[str, Any]], Tokenizer]
"""A file and the folder's tokenizer_config.json → a tokenizer; raises `CheckpointError`."""


class TokenizerFile(NamedTuple):
    """A row of TOKENIZER_FILES."""

    pattern: str
    """Files of the folder by name."""
    read: Read


def _read_model(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """tokenizer.model is SentencePiece's (Llama 2, Gemma) or tiktoken's (Llama 3, GLM-4)."""
    return read_sentencepiece(path, settings) if is_sentencepiece(path) else read_tiktoken(path, settings)


TOKENIZER_FILES = (
    TokenizerFile("tokenizer.json", read_tokenizer_json),
    TokenizerFile("tekken.json", read_tekken),
    TokenizerFile("*.tiktoken", read_tiktoken),
    TokenizerFile("tiktoken.model", read_tiktoken),
    TokenizerFile("tokenizer.model", _read_model),
    TokenizerFile("*.model", _read_model),
    TokenizerFile("vocab.json", read_vocab_and_merges),
    TokenizerFile("vocab.txt", read_vocab_txt),
)
"""The kinds of files, the most exact first."""


def find_tokenizer_file(folder: Path) -> tuple[Path, Read] | None:
    """The file of a folder's tokenizer and the function that reads it, or None. A GGUF file is its own."""
    if is_gguf(folder):
        return folder, read_gguf_tokenizer
    for row in TOKENIZER_FILES:
        # Globbing passes over a name that is a link to nothing.
        for path in sorted(folder.glob(row.pattern)) if "*" in row.pattern else [folder / row.pattern]:
            if is_file(path):
                return path, row.read
    return None
