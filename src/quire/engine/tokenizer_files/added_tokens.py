"""Added and special tokens: the files beside the tokenizer's own file that name them, read as transformers does.

`added_tokens_decoder` of tokenizer_config.json gives ids and texts; in folders without it added_tokens.json does. The
named tokens (bos_token, eos_token, …) and `additional_special_tokens` are special, also where nothing else says so. Two
differences: an id in these files is the token's id, where transformers gives the next free one; and
tokenizer_config.json always goes before special_tokens_map.json, not only where it has `added_tokens_decoder`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from quire.engine.tokenizer_files.gguf import gguf_settings
from quire.errors import CheckpointError
from quire.gguf.file import is_gguf
from quire.model_config import read_json
from quire.model_config.file_kinds import is_file

CONFIG_FILE, MAP_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
MAX_ADDED_ID = 2**24


def read_optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a folder; empty if there is no such file. The folder may be a GGUF file, whose
    metadata say what tokenizer_config.json would hold."""
    if is_gguf(path.parent):
        return gguf_settings(path.parent) if path.name == CONFIG_FILE else {}
    return read_json(path) if is_file(path) else {}


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json. Raises `CheckpointError`."""
    return {**read_optional(folder / MAP_FILE), **read_optional(folder / CONFIG_FILE)}


def named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Name → text of the special tokens, as chat templates use them."""
    found = {}
    for key, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            found[key] = content
    return found


def add_tokens(backend: Tokenizer, folder: Path, settings: dict[str, Any], named: dict[str, str]) -> None:
    """Add the tokens that the folder's files name and the tokenizer lacks. Raises `CheckpointError`."""
    special = [*(named[name] for name in NAMES if name in named), *_listed(folder, settings)]
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in sorted(_with_ids(folder, settings, set(special)), key=lambda pair: pair[0]):
        if token.content in known or token_id > MAX_ADDED_ID:
            continue
        while token.content and backend.get_vocab_size() < token_id and backend.token_to_id(token.content) is None:
            gap = f"<|reserved_token_{backend.get_vocab_size()}|>"
            backend.add_special_tokens([AddedToken(gap, special=True, normalized=False)])
        backend.add_tokens([token])
        known[token.content] = token
    lacking = [text for text in special if text and (text not in known or not known[text].special)]
    backend.add_special_tokens([_as_special(text, known.get(text)) for text in dict.fromkeys(lacking)])


def set_ends(backend: Tokenizer, settings: dict[str, Any], named: dict[str, str], *, add_first: bool) -> None:
    """Put bos and eos around texts as `add_bos_token` and `add_eos_token` say. `add_first` is the default for bos.
    For files that cannot say it themselves."""
    first_flag, last_flag = settings.get("add_bos_token"), settings.get("add_eos_token")
    flags = (add_first if first_flag is None else first_flag is True, last_flag is True)
    first, last = (named.get(name) if flag else None for name, flag in zip(NAMES, flags, strict=False))
    texts = [text for text in (first, last) if text is not None]
    ids = {text: backend.token_to_id(text) for text in texts}
    template = " ".join([*([first] if first else []), "$A", *([last] if last else [])])
    if None not in ids.values():
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(ids.items()))


def _with_ids(folder: Path, settings: dict[str, Any], special: set[str]) -> Iterator[tuple[int, AddedToken]]:
    """The tokens that the files name with their ids."""
    if "added_tokens_decoder" in settings:
        path, decoder = folder / CONFIG_FILE, settings["added_tokens_decoder"]
        if not isinstance(decoder, dict):
            raise _refusal(path, "added_tokens_decoder", decoder, "an object of ids and tokens")
        for key, value in decoder.items():
            if not key.isdecimal() or not isinstance(value, dict) or not isinstance(value.get("content"), str):
                raise _refusal(path, f"added_tokens_decoder.{key}", value, "an id and an object with content")
            flags = {flag: value[flag] for flag in _FLAGS if isinstance(value.get(flag), bool)}
            yield int(key), AddedToken(value["content"], **flags)
        return
    path = folder / ADDED_FILE
    for text, token_id in read_optional(path).items():
        if type(token_id) is not int or token_id < 0:
            raise _refusal(path, text, token_id, "a token id")
        yield token_id, AddedToken(text, special=text in special, normalized=text not in special)


def _listed(folder: Path, settings: dict[str, Any]) -> list[str]:
    """The texts of the lists of further special tokens."""
    texts: list[str] = []
    for key in _LISTS:
        value = settings.get(key) or []
        entries = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(entries, list):
            raise _refusal(folder / CONFIG_FILE, key, value, "a list of tokens")
        for entry in entries:
            text = entry.get("content") if isinstance(entry, dict) else entry
            if not isinstance(text, str):
                raise _refusal(folder / CONFIG_FILE, key, value, "a list of tokens")
            texts.append(text)
    return texts


def _as_special(text: str, known: AddedToken | None) -> AddedToken:
    if known is None:
        return AddedToken(text, special=True, normalized=False)
    return AddedToken(text, special=True, normalized=False, lstrip=known.lstrip, rstrip=known.rstrip)


def _refusal(path: Path, key: str, value: Any, supported: str) -> CheckpointError:
    return CheckpointError(f"{path}: {key} is {json.dumps(value)[:200]}; supported: {supported}")
