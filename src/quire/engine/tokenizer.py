"""Tokenizer: text to token ids and back, with the `tokenizers` library and the files of a model folder.

Limits the text that one request may have tokenised, and knows the bytes of every token. The detokenizer joins tokens as
they arrive. Safe to share between threads.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quire.config import EngineConfig
from quire.engine.checkpoint import tokenizer_folder
from quire.engine.token_lengths import longest_token
from quire.errors import CheckpointError, RequestError

# The library warns if a process forks after it used its own threads. Requests are parallel enough without them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers  # after the variable is set

from quire.engine.tokenizer_files import find_tokenizer_file
from quire.engine.tokenizer_files.added_tokens import add_tokens, named_tokens, read_settings, set_ends
from quire.engine.tokenizer_files.byte_alphabet import BYTE_OF_LETTER
from quire.engine.tokenizer_files.sentencepiece import special_pieces
from quire.gguf.file import is_gguf
from quire.model_config.file_kinds import describe_content

MAX_PROMPT_CHARS = 4_000_000
"""Takes a few seconds to tokenise, and is more than the longest contexts hold."""

MAX_TOKENIZER_FILE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class PieceRules:
    """Rules for decoding by joining the bytes of tokens.

    Cover byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece in Hugging Face's form (Llama 2, Mistral, Gemma).
    """

    byte_level: bool = False
    """Tokens are written in GPT-2's alphabet of one printable character per byte."""
    byte_tokens: bool = False
    """A token like `<0xE2>` is one byte of a character that the vocabulary lacks."""
    replacements: tuple[tuple[str, str], ...] = ()
    strip_start: str = ""
    """Removed from the start of the whole text: the space that encoding adds."""

    @staticmethod
    def of(decoder: Mapping[str, Any] | None) -> "PieceRules | None":
        """From the `decoder` of tokenizer.json; None if decoding is more than joining bytes."""
        if decoder is None:
            return None
        replacements: list[tuple[str, str]] = []
        byte_tokens, fused, strip_start = False, False, ""
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        for step in steps:
            match step:
                case {"type": "ByteLevel"} if len(steps) == 1:
                    return PieceRules(byte_level=True)
                case {"type": "Replace", "pattern": {"String": pattern}, "content": content} if not fused:
                    replacements.append((pattern, content))
                case {"type": "Metaspace", "replacement": mark} if not fused:
                    replacements.append((mark, " "))
                    strip_start = " " if step.get("prepend_scheme", "always") != "never" else ""
                case {"type": "ByteFallback"} if not fused:
                    byte_tokens = True
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": content, "start": start, "stop": 0} if fused:
                    strip_start = content * start
                case _:
                    return None
        return PieceRules(byte_tokens=byte_tokens, replacements=tuple(replacements), strip_start=strip_start)


class Tokenizer:
    """A model's tokenizer. `from_folder` reads one; the constructor takes the library's object."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        *,
        max_prompt_chars: int = MAX_PROMPT_CHARS,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.max_prompt_chars = max_prompt_chars
        self.special_tokens = dict(special_tokens)
        """Name in chat templates → text, as in {"bos_token": "<s>"}."""
        added = backend.get_added_tokens_decoder()
        self.added_tokens: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        """Control tokens, which `skip_special_tokens` omits from text."""
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        # The pickled state of a decoder is its part of tokenizer.json. Parsing the whole file takes far longer.
        self.pieces = PieceRules.of(backend.decoder and json.loads(backend.decoder.__getstate__()))
        self._bytes_of_token: dict[int, bytes] = {}  # filled on use; at most the vocabulary
        self.whole_texts: dict[int, str] = {}
        """Texts of ordinary tokens that are whole characters, as the detokenizers find them."""

    @classmethod
    def from_folder(cls, folder: str | Path, *, max_prompt_chars: int = MAX_PROMPT_CHARS) -> "Tokenizer":
        """Read the tokenizer of a folder, from whichever of TOKENIZER_FILES it holds. Raises `CheckpointError`."""
        folder = Path(folder)
        found = find_tokenizer_file(folder)
        if found is None:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'} is missing, and the folder holds no other tokenizer that Quire reads "
                "(tokenizer.model, tekken.json, *.tiktoken, vocab.json with merges.txt, vocab.txt); copy it from the "
                "model's repository, or convert another kind with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        path, read = found
        if not is_gguf(path) and path.stat().st_size > MAX_TOKENIZER_FILE_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes; at most {MAX_TOKENIZER_FILE_BYTES:,} are read"
            )
        reason = None if is_gguf(path) else describe_content(path)
        if reason is not None:
            raise CheckpointError(f"{path} {reason}")
        settings = read_settings(folder)
        backend = read(path, settings)
        named = {**_own_special_tokens(path, backend), **named_tokens(settings)}
        add_tokens(backend, folder, settings, named)
        if path.name not in ("tokenizer.json", "vocab.txt"):  # which say it themselves
            set_ends(backend, settings, named, add_first=path.suffix == ".model")
        return cls(backend, named, max_prompt_chars=max_prompt_chars)

    def to_json(self) -> str:
        """The tokenizer in the form of tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the tokenizer, added ones included; the model's table may be larger."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens spelled out in the text are recognised, as chat templates require.

        `add_special_tokens` adds the tokens that the model expects around a text, often a BOS token. Text from a chat
        template contains them already.
        """
        return self.encode_all([text], add_special_tokens)[0]

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text. Other threads run meanwhile: only the library's calls for batches release the GIL."""
        for text in texts:
            if len(text) > self.max_prompt_chars:
                raise RequestError(
                    f"the prompt has {len(text):,} characters; at most {self.max_prompt_chars:,} are tokenised. "
                    "Shorten it, or send token ids",
                    param="prompt",
                    code="context_length_exceeded",
                )
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except (UnicodeError, TypeError):  # which of the two depends on the library's version
            raise RequestError("the prompt holds half of a surrogate pair and is no text", param="prompt") from None
        except BaseException as error:
            # A panic inside the library is not an Exception in Python. It must end only its own request.
            if type(error).__module__ != "pyo3_runtime":
                raise
            raise RequestError("the tokenizer cannot read the prompt", param="prompt") from None
        return [encoding.ids for encoding in encodings]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """Token ids of each pair of texts as the model joins them, and the index where the second text begins; 0 if the
        tokenizer does not mark it."""
        for pair in pairs:
            if sum(map(len, pair)) > self.max_prompt_chars:
                raise RequestError(
                    f"a pair of texts has {sum(map(len, pair)):,} characters; at most {self.max_prompt_chars:,} are "
                    "tokenised. Shorten it",
                    param="documents",
                    code="context_length_exceeded",
                )
        try:
            encodings = self._backend.encode_batch_fast(list(pairs), add_special_tokens=True)
        except (UnicodeError, TypeError):
            raise RequestError("a text holds half of a surrogate pair and is no text", param="documents") from None
        return [(found.ids, found.type_ids.index(1) if 1 in found.type_ids else 0) for found in encodings]

    def shorten(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """At most `num_tokens` of the tokens: the last ones are left out, save the special tokens that end a text."""
        if len(token_ids) <= num_tokens:
            return token_ids
        end = len(token_ids)
        while end and token_ids[end - 1] in self.special_ids:
            end -= 1
        tail = token_ids[end:][: max(0, num_tokens - 1)]
        return token_ids[: num_tokens - len(tail)] + tail

    def cut(self, text: str, num_tokens: int) -> str:
        """The beginning of a text that has at most `num_tokens` tokens."""
        (found,) = self._backend.encode_batch([text], add_special_tokens=False)
        return text if len(found.ids) <= num_tokens else text[: found.offsets[num_tokens - 1][1]]

    def bad_word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each text at the start of an output and, with a space before it, in the middle."""
        texts = [text for word in words for text in (word, " " + word.lstrip())]
        found = dict.fromkeys(map(tuple, self.encode_all(texts, add_special_tokens=False)))
        return tuple(tokens for tokens in found if tokens)

    def most_chars(self, num_tokens: int) -> int | None:
        """Characters that `num_tokens` tokens can stand for at most; None if a token can stand for any number.

        A longer text has more tokens for certain, so it need not be tokenised to be refused.
        """
        return None if self.longest_token is None else num_tokens * self.longest_token

    @cached_property
    def longest_token(self) -> int | None:
        """Characters of the longest token; None if there is no limit, as where spaces or unknown characters vanish."""
        return longest_token(self._backend) if self.pieces is not None else None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Other threads run meanwhile. `Detokenizer` decodes tokens one by one."""
        (text,) = self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
        return str(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text, perhaps part of a character; empty for an unused id."""
        found = self._bytes_of_token.get(token_id)
        if found is None:
            found = self._bytes_of_token[token_id] = self._spell(token_id)
        return found

    def id_to_text(self, token_id: int) -> str:
        """The token for display, special or not, with its leading space; part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _spell(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.pieces is None:
            return self.decode([token_id], skip_special_tokens=False).encode()
        if self.pieces.byte_level:
            # A token with a character outside the alphabet, such as an added token with a space, is plain text.
            values = [BYTE_OF_LETTER.get(letter) for letter in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if self.pieces.byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for pattern, content in self.pieces.replacements:
            token = token.replace(pattern, content)
        return token.encode()

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        token_id: int | None = None if token is None else self._backend.token_to_id(token)
        return token_id


def load_tokenizer(config: EngineConfig, folder: Path) -> Tokenizer | None:
    """The tokenizer of the model or of the option `tokenizer`; None if there is none: prompts are then token ids."""
    folder = tokenizer_folder(config, folder)
    try:
        return Tokenizer.from_folder(folder)
    except CheckpointError:
        if config.tokenizer is not None or find_tokenizer_file(folder) is not None:
            raise
        return None


def read_special_tokens(folder: str | Path) -> dict[str, str]:
    """Name → text of the special tokens that the files of a folder name."""
    folder = Path(folder)
    found = find_tokenizer_file(folder)
    own = special_pieces(found[0]) if found is not None and found[0].suffix == ".model" else {}
    return {**own, **named_tokens(read_settings(folder))}


def _own_special_tokens(path: Path, backend: tokenizers.Tokenizer) -> dict[str, str]:
    """The special tokens that a tokenizer's file implies; tokenizer.json implies none, and GGUF names them."""
    if path.suffix == ".model" and (own := special_pieces(path)):
        return own
    if path.name == "tokenizer.json" or is_gguf(path):
        return {}
    usual = {
        "bos_token": ("<|begin_of_text|>", "<s>", "[BOS]"),
        "eos_token": ("<|end_of_text|>", "</s>", "[EOS]", "<|endoftext|>"),
    }
    vocab = {name: [text for text in texts if backend.token_to_id(text) is not None] for name, texts in usual.items()}
    return {name: texts[0] for name, texts in vocab.items() if texts}


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def describe_tokenizer(tokenizer: Tokenizer | None, seconds: float) -> str:
    """The line about the tokenizer that is printed at start."""
    if tokenizer is None:
        return "tokenizer: none in the model's folder; prompts must be token ids, and answers have no text"
    return f"tokenizer: {seconds:.2f} s"
