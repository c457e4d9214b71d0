"""tokenizer_metadata: what a GGUF file says of a folder's tokenizer, for llama.cpp and its kin.

The whole tokenizer.json is written too, and Quire reads it first, so ids here never depend on llama.cpp's rules.
"""

import json
import logging
from array import array
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from quire.engine.chat_template import read_sources
from quire.engine.tokenizer import Tokenizer
from quire.engine.tokenizer_files import find_tokenizer_file
from quire.engine.tokenizer_files.added_tokens import named_tokens, read_settings
from quire.engine.tokenizer_files.cuts import CUTS
from quire.engine.tokenizer_files.gguf import set_cut
from quire.errors import CheckpointError
from quire.gguf.header import Value
from quire.model_config import ModelConfig

logger = logging.getLogger(__name__)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_UNMERGED = -1e6
"""Score of a piece that no merge makes."""
_PROBES = (
    "Hello World, it's 12345 o'clock; they'LL say: I'm 3.14 'cause we'd 've\n\n  x=y+1;\r\n\tif (a != b) { return; }",
    "Gr\u00f6\u00dfe d\u00e9j\u00e0-vu NA\u00cfVE camelCase snake_case \u00c9COLE DON'T \u2026 \u201cquotes\u201d",
    "$100,000.00 50% #tag @me \u4f60\u597d,\u4e16\u754c!\u4eca\u5929\u662f2024\u5e743\u670815\u65e5\u3002",
    "\u3053\u3093\u306b\u3061\u306f \uc548\ub155 \u0928\u092e\u0938\u094d\u0924\u0947 \u05e9\u05dc\u05d5\u05dd",
    " leading   and trailing  \n \n\n end \U0001f642\U0001f469 e\u0301 A\u030a ``code`` ~~ ^^ || a/b\\c 1 22 333 4444",
)
"""Texts that tell the cuts of CUTS apart."""


def tokenizer_metadata(config: ModelConfig, source: Path) -> dict[str, Value]:
    """The keys tokenizer.*; none for a model without a tokenizer. Raises `CheckpointError` for a kind that GGUF has no
    name for."""
    if find_tokenizer_file(source) is None:
        return {}
    tokenizer = Tokenizer.from_folder(source)
    text = tokenizer.to_json()
    state, settings = json.loads(text), read_settings(source)
    model = state["model"]
    if model["type"] != "BPE":
        raise CheckpointError(
            f"{source}: its tokenizer is of the kind {model['type']}; supported in GGUF: byte-pair encoding"
        )
    tokens, kinds = _tokens(state, config.vocab_size)
    index = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model["merges"]]
    values: dict[str, Value] = {"tokenizer.huggingface.json": text, "tokenizer.ggml.tokens": tokens}
    if model.get("byte_fallback"):
        values |= _pieces(state, tokens, kinds, merges)
    else:
        values |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _cut_of(text, source),
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        }
    values["tokenizer.ggml.token_type"] = memoryview(array("i", kinds))
    named = named_tokens(settings)
    values |= {
        f"tokenizer.ggml.{key}_token_id": index[named[name]] for name, key in _NAMED.items() if named.get(name) in index
    }
    values |= _ends(config, tokenizer)
    return values | {
        "tokenizer.chat_template" + ("" if name == "default" else f".{name}"): template
        for name, template in read_sources(source)[0].items()
    }


def _tokens(state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and kinds of all tokens; a number without a text is unused."""
    found = {number: text for text, number in state["model"]["vocab"].items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    found |= {number: token["content"] for number, token in added.items()}
    tokens = [found.get(number, f"[PAD{number}]") for number in range(max(vocab_size, max(found, default=0) + 1))]
    kinds = []
    for number, text in enumerate(tokens):
        if number in added:
            kinds.append(_CONTROL if added[number]["special"] else _USER_DEFINED)
        elif number not in found:
            kinds.append(_UNUSED)
        else:
            is_byte = state["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x")
            kinds.append(_BYTE if is_byte else _NORMAL)
    return tokens[:vocab_size], kinds[:vocab_size]


def _pieces(
    state: dict[str, Any], tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]]
) -> dict[str, Value]:
    """SentencePiece's form: a piece's score is the better the earlier it is merged."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    unknown = state["model"].get("unk_token")
    if unknown in tokens:
        kinds[tokens.index(unknown)] = _UNKNOWN
    scores = [-float(ranks[token]) if token in ranks else _UNMERGED for token in tokens]
    prepends = json.dumps(state.get("normalizer") or "") + json.dumps(state.get("pre_tokenizer") or "")
    adds_space = '"Prepend"' in prepends or '"prepend_scheme": "first"' in prepends or '"always"' in prepends
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": memoryview(array("f", scores)),
        "tokenizer.ggml.add_space_prefix": adds_space,
    }


def _cut_of(text: str, source: Path) -> str:
    """The name of the cut that gives the tokenizer's ids for every probe, as llama.cpp's converter finds it."""
    backend = Backend.from_str(text)
    expected = [backend.encode(probe, add_special_tokens=False).ids for probe in _PROBES]
    for name, cut in CUTS.items():
        set_cut(backend, cut)
        if [backend.encode(probe, add_special_tokens=False).ids for probe in _PROBES] == expected:
            return name
    logger.warning(
        "%s: llama.cpp has no name for the way in which this tokenizer cuts texts into words; Quire reads the file's "
        "tokenizer.json, other programs may make other tokens of a text",
        source,
    )
    return "default"


def _ends(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Value]:
    """Whether texts begin with the first token, and the end tokens that no name has."""
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    values: dict[str, Value] = {
        "tokenizer.ggml.add_bos_token": len(full) > len(plain) and full[-len(plain) :] == plain,
        "tokenizer.ggml.add_eos_token": len(full) > len(plain) and full[: len(plain)] == plain,
    }
    for key, token in zip(("eos", "eot", "eom"), config.eos_token_ids, strict=False):
        values[f"tokenizer.ggml.{key}_token_id"] = token
    return values
