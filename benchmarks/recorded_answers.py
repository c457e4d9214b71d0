"""Answers that repeat their prompt, as summaries and edits do, and a logits processor that makes any model give them.

The models of the benchmarks have random weights: their own text repeats nothing, or everything. Here the text is real
and the work is the model's. It computes every token and every draft; then its logits are changed so that the recorded
token is sampled. So the text alone decides which drafts are accepted.

Five kinds, all from this repository and of a few hundred tokens, in the 32,000 tokens of Mistral's vocabulary:

- edit: a Python file before a commit, and the commit's subject. Answer: the file after the commit.
- revision: the same for a page of documentation.
- quotation: some pages of a play. Answer: everything that one person says there.
- outline: a Python file. Answer: its classes and functions, each with the first sentence of its docstring.
- summary: a Python file without its module docstring. Answer: that docstring, which is written and not quoted.
"""

import ast
import lzma
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from quire import SamplingParams
from quire.sampling.logits_processors import RowView

ROOT = Path(__file__).parents[1]
LAST_COMMIT = "b918a493f1a9fde9b920c466e90c7fd8aae95dbf"
"""Edits come from this commit's ancestors; outlines and summaries from its files."""
PROMPT_LENGTHS = range(200, 1_500)
ANSWER_LENGTHS = range(80, 700)
FAR_ABOVE = 1e4
"""A logit far above all others, at every temperature used here."""


@dataclass(frozen=True)
class Answer:
    """A prompt and the recorded answer."""

    prompt_token_ids: list[int]
    token_ids: list[int]


class Recorded:
    """A logits processor that makes the recorded answers win. The request's seed is the index of its answer."""

    def __init__(self, answers: Sequence[Answer] = ()) -> None:
        self.answers = answers

    def wants(self, params: SamplingParams) -> bool:
        return bool(self.answers)

    def apply(self, logits: Tensor, rows: Sequence[RowView]) -> Tensor:
        """A row after draft tokens has them in its output. If they are wrong, its sample does not count."""
        for place, row in enumerate(rows):
            assert row.params.seed is not None
            logits[place, self.answers[row.params.seed].token_ids[len(row.output_token_ids)]] = FAR_ABOVE
        return logits


def recorded_answers(kind: str, count: int) -> list[Answer]:
    """The first `count` answers of a kind, always the same."""
    answers = []
    for prompt, text in KINDS[kind]():
        answer = Answer(_tokenizer().encode(prompt).ids, _tokenizer().encode(text, add_special_tokens=False).ids)
        if len(answer.prompt_token_ids) in PROMPT_LENGTHS and len(answer.token_ids) in ANSWER_LENGTHS:
            answers.append(answer)
            if len(answers) == count:
                return answers
    raise SystemExit(f"there are {len(answers)} answers of kind {kind}, and {count} are asked for")


def edits(suffix: str = ".py") -> Iterator[tuple[str, str]]:
    """The newest commits that changed such a file: one file per commit, each file once."""
    seen = set[str]()
    log = _git("log", "--diff-filter=M", "--name-only", "--format=%x00%H %s", LAST_COMMIT, "--", f"*{suffix}")
    for entry in log.split("\0")[1:]:
        commit, _, rest = entry.partition(" ")
        subject, *paths = filter(None, rest.splitlines())
        path = next((path for path in paths if path not in seen), None)
        if path is not None:
            seen.add(path)
            before, after = (_git("show", f"{each}:{path}") for each in (f"{commit}^", commit))
            yield f"{path}:\n```\n{before}```\n{subject}. Write the whole file.\n```\n", f"{after}```"


def revisions() -> Iterator[tuple[str, str]]:
    return edits(".md")


def quotations() -> Iterator[tuple[str, str]]:
    """Pieces of ten speeches, and in each the speeches of the person who speaks most often."""
    play = (ROOT / "tests" / "data" / "held_out.txt").read_text(encoding="utf-8")
    speeches = re.findall(r"^([A-Z][\w ]+):\n(.+?)\n\n", play, re.MULTILINE | re.DOTALL)
    for start in range(0, len(speeches) - 9, 5):
        piece = speeches[start : start + 10]
        person, _ = Counter(name for name, _ in piece).most_common(1)[0]
        scene = "\n\n".join(f"{name}:\n{speech}" for name, speech in piece)
        said = "\n\n".join(f'"{speech}"' for name, speech in piece if name == person)
        yield f"{scene}\n\nWhat does {person} say? Quote all of it.\n\n", f"{person} says:\n\n{said}\n"


def outlines() -> Iterator[tuple[str, str]]:
    for path, source, tree in _modules():
        lines = [f"{path}: {_first_sentence(tree)}"]
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        for node in sorted(nodes, key=lambda node: node.lineno):
            head = source.splitlines()[node.lineno - 1 : max(node.lineno, node.body[0].lineno - 1)]
            lines.append(f"- `{' '.join(map(str.strip, head))}` {_first_sentence(node)}")
        yield f"{path}:\n```\n{source}```\nOutline this file.\n\n", "\n".join(lines)


def summaries() -> Iterator[tuple[str, str]]:
    for path, source, tree in _modules():
        rest = "\n".join(source.splitlines()[tree.body[0].end_lineno :])
        yield f"{path}:\n```\n{rest}\n```\nWrite the docstring of this file.\n\n", f'"""{ast.get_docstring(tree)}"""'


def _modules() -> Iterator[tuple[str, str, ast.Module]]:
    """Path, text and syntax tree of every module."""
    for path in _git("ls-tree", "-r", "--name-only", LAST_COMMIT, "src/quire").splitlines():
        if path.endswith(".py"):
            source = _git("show", f"{LAST_COMMIT}:{path}")
            yield path, source, ast.parse(source)


def _first_sentence(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    text = " ".join((ast.get_docstring(node) or "").split())
    return re.split(r"(?<=\.) ", text)[0]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@cache
def _tokenizer() -> Tokenizer:
    stored = ROOT / "tests" / "data" / "tokenizers" / "mistral-v1" / "tokenizer.json.xz"
    return Tokenizer.from_str(lzma.decompress(stored.read_bytes()).decode())


KINDS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "edit": edits,
    "revision": revisions,
    "quotation": quotations,
    "outline": outlines,
    "summary": summaries,
}
