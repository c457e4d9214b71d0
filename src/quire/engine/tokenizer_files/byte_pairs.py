"""Byte-level BPE in other files than tokenizer.json: tiktoken's ranks, Mistral's tekken.json, GPT-2's vocab and merges.

A file of ranks lists tokens as bytes; two neighbours merge if their bytes together are a token, the lowest rank first.
The library wants merges of pairs, so each token gives every pair of tokens that it can be made from. What text is cut
into before is not in tiktoken's files: it follows from the family.
"""

import base64
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from quire.engine.tokenizer_files.byte_alphabet import spell
from quire.errors import CheckpointError
from quire.model_config import read_json

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
CL100K = rf"{_SUFFIXES}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
"""Llama 3, GLM-4 and cl100k_base: numbers in groups of three digits."""
QWEN = rf"{_SUFFIXES}|{_WORDS}|\p{{N}}|{_REST}"
"""Qwen: numbers digit by digit."""
KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}&&[^\p{{Han}}]]*[{_LOWER}&&[^\p{{Han}}]]+{_SUFFIXES}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}&&[^\p{{Han}}]]+[{_LOWER}&&[^\p{{Han}}]]*{_SUFFIXES}?|\p{{N}}{{1,3}}|{_REST}"
)
"""Kimi: Chinese characters apart from other letters, words cut where a capital follows."""

_LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_TEKKEN_NAMED = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""The control tokens of the first tekken.json files, which do not list them."""


def read_tiktoken(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """A file with a line for each token: its bytes in base64 and its rank. Raises `CheckpointError`."""
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is neither a SentencePiece model nor a tiktoken file, whose lines hold a token in base64 and its "
            f"rank: {error}"
        ) from error
    if not ranks:
        raise CheckpointError(f"{path} holds no tokens")
    pattern, control = _family(path, settings, first=max(ranks.values()) + 1)
    return _from_ranks(path, ranks, pattern, control)


def read_tekken(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """Mistral's tekken.json, which has the pattern and counts its control tokens first. Raises `CheckpointError`."""
    content = read_json(path)
    config, vocab = content.get("config"), content.get("vocab")
    try:
        num_control = int(config["default_num_special_tokens"])  # type: ignore[index]
        num_ranked = int(config["default_vocab_size"]) - num_control  # type: ignore[index]
        pattern = str(config["pattern"])  # type: ignore[index]
        tokens = [base64.b64decode(entry["token_bytes"]) for entry in vocab[:num_ranked]]  # type: ignore[index]
        named = {entry["rank"]: entry["token_str"] for entry in content.get("special_tokens") or ()}
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no tekken.json of Mistral: {type(error).__name__}: {error}") from error
    named = named or dict(enumerate(_TEKKEN_NAMED))
    control = {rank: named.get(rank, f"<SPECIAL_{rank}>") for rank in range(num_control)}
    return _from_ranks(path, {token: num_control + rank for rank, token in enumerate(tokens)}, pattern, control)


def read_vocab_and_merges(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """GPT-2's vocab.json and merges.txt; Qwen's in the same files. Raises `CheckpointError`."""
    merges_file = path.with_name("merges.txt")
    if not merges_file.is_file():
        raise CheckpointError(f"{merges_file} is missing; vocab.json needs it beside itself")
    vocab = read_json(path)
    if not all(type(token_id) is int for token_id in vocab.values()):
        raise CheckpointError(f"{path} is no vocabulary: supported are texts of tokens with their ids")
    lines = merges_file.read_text(encoding="utf-8").splitlines()
    halves = [line.partition(" ") for line in lines if line and not line.startswith("#version")]
    pairs = [(left, right) for left, _, right in halves]
    try:
        model = models.BPE(vocab, pairs)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{merges_file} does not fit vocab.json: {error}") from error
    backend = Tokenizer(model)
    if str(settings.get("tokenizer_class", "")).startswith("Qwen"):
        backend.normalizer = normalizers.NFC()
        _cut(backend, QWEN)
    else:
        prefix = settings.get("add_prefix_space") is True
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=True)
        backend.decoder = decoders.ByteLevel()
    return backend


def _family(path: Path, settings: dict[str, Any], *, first: int) -> tuple[str, dict[int, str]]:
    """The pattern of a tiktoken file, and the control tokens that the family has from id `first` on, where the folder
    does not name them."""
    config = path.with_name("config.json")
    model_type = str(read_json(config).get("model_type", "")) if config.is_file() else ""
    names = f"{path.name} {model_type} {settings.get('tokenizer_class', '')}".lower()
    if "qwen" in names:
        extras = [f"<|extra_{index}|>" for index in range(205)]
        return QWEN, dict(enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extras], first))
    if "kimi" in names or "moonshot" in names or "tiktokentokenizer" in names:
        return KIMI, {}
    if first == 128_000 and not settings.get("added_tokens_decoder"):
        reserved = [index for index in range(256) if index not in _LLAMA3_NAMED]
        numbered = {index: f"<|reserved_special_token_{number}|>" for number, index in enumerate(reserved)}
        return CL100K, {first + index: text for index, text in (_LLAMA3_NAMED | numbered).items()}
    return CL100K, {}


def _from_ranks(path: Path, ranks: dict[bytes, int], pattern: str, control: dict[int, str]) -> Tokenizer:
    """A tokenizer of tokens with their ids, which are also the order of merging, and of control tokens."""
    vocab = {spell(token): token_id for token, token_id in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:end], token[end:]) for end in range(1, len(token))]
        pairs = [(left, right) for left, right in splits if left in ranks and right in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    taken = set(vocab.values())
    vocab |= {text: token_id for token_id, text in control.items() if token_id not in taken}
    try:
        spelled = [(spell(left), spell(right)) for left, right in merges]
        backend = Tokenizer(models.BPE(vocab, spelled, ignore_merges=True))
        _cut(backend, pattern)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} is no usable vocabulary: {error}") from error
    by_id = sorted(control.items())
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for _, text in by_id])
    return backend


def _cut(backend: Tokenizer, pattern: str) -> None:
    """Cut text by a pattern, and write what is cut in GPT-2's alphabet."""
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, letters])
    backend.decoder = decoders.ByteLevel()
