"""`python scripts/write_flaws_page.py`: writes docs/published-flaws.md from the names and docstrings of tests/security.

A test named `test_07_…` or `test_18_and_20_…` tries the flaws of these rows; its docstring names their ids.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "published-flaws.md"
TESTS = ROOT / "tests" / "security"
_NAME = re.compile(r"test_(\d\d(?:_and_\d\d)*)_\w+")
_ID = re.compile(r"(?:CVE|PYSEC)-\d{4}-\d+|GHSA(?:-\w{4}){3}")

HEADING = """# Published flaws

Written by `python scripts/write_flaws_page.py`; do not edit.

Flaws that were published for other servers of language models, and the tests that try them on this one. A row's number
is part of the names of its tests.

| row | published as | tests |
| --- | --- | --- |
"""


@dataclass(frozen=True, slots=True)
class FlawTest:
    """A test of a row."""

    file: str
    name: str
    doc: str


def rows() -> dict[int, list[FlawTest]]:
    """Row → its tests."""
    found: dict[int, list[FlawTest]] = {}
    for path in sorted(TESTS.glob("test_*.py")):
        for numbers, test in _tests(path):
            for number in numbers:
                found.setdefault(number, []).append(test)
    return found


def _tests(path: Path) -> Iterator[tuple[list[int], FlawTest]]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and (match := _NAME.fullmatch(node.name)):
            numbers = [int(part) for part in match[1].split("_and_")]
            yield numbers, FlawTest(path.name, node.name, ast.get_docstring(node) or "")


def page() -> str:
    """The whole page."""
    lines = []
    for number, tests in sorted(rows().items()):
        ids = dict.fromkeys(each for test in tests for each in _ID.findall(test.doc))
        names = "<br>".join(f"`{test.file}` `{test.name}`" for test in tests)
        lines.append(f"| {number} | {', '.join(ids)} | {names} |")
    return HEADING + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
