"""Fill in the middle: the prompt that asks a model for the text between a prefix and a suffix.

Models trained for it have tokens that mark the parts. A family is a row of `FAMILIES`.
"""

from dataclasses import dataclass

from quire.engine.tokenizer import Tokenizer
from quire.errors import RequestError


@dataclass(frozen=True, slots=True)
class FillInMarks:
    """Texts of the tokens in front of the parts. The answer follows the last part."""

    prefix: str
    suffix: str
    middle: str = ""
    """Ends the prompt; empty if nothing does."""
    suffix_first: bool = False
    separator: str = ""
    """Between two files of context; empty: a blank line."""


FAMILIES = (
    FillInMarks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", separator="<|file_sep|>"),  # Qwen, CodeGemma
    FillInMarks("<fim_prefix>", "<fim_suffix>", "<fim_middle>", separator="<file_sep>"),  # StarCoder, Granite
    FillInMarks("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    FillInMarks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    FillInMarks("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    FillInMarks("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    FillInMarks("[PREFIX]", "[SUFFIX]", suffix_first=True),  # Codestral
)


@dataclass(frozen=True, slots=True)
class FillInTokens:
    """Token ids of a family's marks; None where the family or the tokenizer has none."""

    prefix: int
    suffix: int
    middle: int | None
    separator: int | None
    suffix_first: bool

    @property
    def stop_token_ids(self) -> list[int]:
        """Marks in an answer end it: another file would follow."""
        return [token for token in (self.prefix, self.suffix, self.middle, self.separator) if token is not None]


def find_marks(tokenizer: Tokenizer) -> FillInTokens | None:
    """The marks that `tokenizer` has; None if it has none."""
    ids = {text: token_id for token_id, text in tokenizer.added_tokens.items()}
    for family in FAMILIES:
        needed = [mark for mark in (family.prefix, family.suffix, family.middle) if mark]
        if all(mark in ids for mark in needed):
            middle, separator = ids.get(family.middle), ids.get(family.separator)
            return FillInTokens(ids[family.prefix], ids[family.suffix], middle, separator, family.suffix_first)
    return None


def checked_marks(tokenizer: Tokenizer, param: str) -> FillInTokens:
    """The marks of `tokenizer`. Raises `RequestError`, naming the field `param`, if it has none."""
    marks = find_marks(tokenizer)
    if marks is None:
        raise RequestError(
            f"{param} needs a model that fills in the middle; this model's tokenizer has no tokens for it: leave "
            f"{param} out",
            param=param,
            code="not_available",
        )
    return marks


def fill_in_prompt(
    tokenizer: Tokenizer, marks: FillInTokens, prefix: list[int], suffix: list[int], context: list[list[int]]
) -> list[int]:
    """The prompt for the tokens between `prefix` and `suffix`. `context` are other files, without special tokens."""
    begin = tokenizer.encode("", add_special_tokens=True)[:1]
    tokens = begin if begin == [tokenizer.bos_token_id] else []
    blank = [marks.separator] if marks.separator is not None else tokenizer.encode("\n\n", add_special_tokens=False)
    for file in context:
        tokens = [*tokens, *file, *blank]
    if marks.suffix_first:
        return [*tokens, marks.suffix, *suffix, marks.prefix, *prefix]
    end = [marks.middle] if marks.middle is not None else []
    return [*tokens, marks.prefix, *prefix, marks.suffix, *suffix, *end]
