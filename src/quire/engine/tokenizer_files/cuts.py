"""CUTS: how byte-level BPE cuts a text into words before it joins bytes, by the name that GGUF files give.

A GGUF file has no patterns, only `tokenizer.ggml.pre`. Each of a cut's patterns cuts what the ones before it left; text
between matches is a word too. The patterns are those of the original tokenizers.
"""

from typing import NamedTuple

from quire.engine.tokenizer_files.byte_pairs import CL100K, KIMI, QWEN

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{end}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{end}}"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_O200K = rf"{_CASED.replace('{end}', _SUFFIXES + '?')}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_REST}"
_TEKKEN = rf"{_CASED.replace('{end}', '')}|\p{{N}}|{_SYMBOLS}|{_REST}"
_QWEN35 = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"
_SEED = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_REST}"
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}"
)
_CHINESE = "[一-龥ࠀ-一가-퟿]+"


class Cut(NamedTuple):
    """A row of CUTS."""

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    """A whole word of the vocabulary is one token, whatever its merges."""
    adds_first: bool = False
    """Texts begin with the BOS token where the file does not say it."""
    composes: bool = False
    """The original composes characters (NFC) first."""


_OF_LLAMA3 = Cut((CL100K,), ignores_merges=True, adds_first=True)
_OF_GPT2 = Cut((_GPT2,))
_OF_QWEN = Cut((QWEN,), composes=True)
_OF_STARCODER = Cut((r"\p{N}", _GPT2))
_OF_O200K = Cut((_O200K,), ignores_merges=True)

CUTS: dict[str, Cut] = {
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2"), _OF_LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), Cut((CL100K,))),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4"), _OF_GPT2),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "hunyuan", "megrez"), _OF_QWEN),
    "stablelm2": Cut((QWEN,)),
    "qwen35": Cut((_QWEN35,), composes=True),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _OF_STARCODER),
    **dict.fromkeys(("gpt-4o", "llama4"), _OF_O200K),
    "tekken": Cut((_TEKKEN,), ignores_merges=True, adds_first=True),
    "falcon": Cut((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "bloom": Cut((r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    "deepseek-llm": Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, r"\p{N}+")),
    "deepseek-coder": Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, r"\p{N}")),
    "deepseek-v3": Cut((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3)),
    "kimi-k2": Cut((KIMI,), ignores_merges=True),
    "seed-coder": Cut((_SEED,)),
    "bailingmoe": Cut((_BAILING,)),
}
"""By `tokenizer.ggml.pre`."""
