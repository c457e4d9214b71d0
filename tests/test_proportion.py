"""Holds files, functions and parameter lists to a size, and docstrings and comments to plain words."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "src/quire").rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
MAX_PARAMETERS = 9

LONG_FUNCTIONS: dict[str, str] = {}
"""Functions above MAX_FUNCTION_LINES, as "file:name" → why."""
TRITON = "kernels/triton/"
"""A Triton kernel takes pointers, strides and sizes one by one, and cannot be split without a call for each tile."""

UNCLEAR = re.compile(r"\b(whoever|whosever|whomever|of which|told|nobody who|those that were)\b", re.IGNORECASE)
"""Words that made sentences of this project hard to read. Say who does what."""


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function as "file:name", files relative to the package."""
    for path in FILES:
        file = str(path.relative_to(ROOT / "src/quire"))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file}:{node.name}", node


def is_kernel(name: str) -> bool:
    return name.startswith(TRITON)


def num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters that a caller gives: not self or cls."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_files_are_short() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in long.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {name for name, node in functions() if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES}
    assert {name for name in long if not is_kernel(name)} == set(LONG_FUNCTIONS)


def test_functions_take_few_parameters() -> None:
    many = {name for name, node in functions() if num_parameters(node) > MAX_PARAMETERS}
    assert {name for name in many if not is_kernel(name)} == set()


def texts() -> Iterator[tuple[str, str]]:
    """Every docstring and comment, with its place."""
    for path in FILES:
        source = path.read_text()
        file = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield f"{file}:{node.lineno}", node.value.value
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield f"{file}:{token.start[0]}", token.string.lstrip("# ")


def test_texts_say_who_does_what() -> None:
    found = [f"{place}: {match[0]}" for place, text in texts() if (match := UNCLEAR.search(text))]
    assert found == []


def test_docstrings_name_their_subject() -> None:
    """ "Of those proposed." needs the line above it to be understood."""
    assert [place for place, text in texts() if re.match(r"\s*(Of|Those|Whose)\b", text)] == []
