"""scripts/find_python.sh, which `make` asks first: old Pythons are passed over, and what is missing is named."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/find_python.sh"
PYTHON = """#!/bin/sh
case "$2" in
    *version_info*) exit {old} ;;
    *ensurepip*) exit {no_venv} ;;
    *Python.h*) exit {no_headers} ;;
    *) echo "$0" ;;
esac
"""


def find(folder: Path, pythons: dict[str, set[str]], **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run the script where only `pythons` and a compiler are to be found. A python's faults are those of PYTHON."""
    for name, faults in pythons.items():
        program = folder / name
        program.write_text(PYTHON.format(**{each: int(each in faults) for each in ("old", "no_venv", "no_headers")}))
        program.chmod(0o755)
    return subprocess.run(
        ["/bin/sh", str(SCRIPT)], env={"PATH": str(folder), **variables}, capture_output=True, text=True
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "c++").symlink_to("/bin/true")
    return tmp_path


@pytest.mark.parametrize(
    ("pythons", "found"),
    [
        ({"python3": set()}, "python3"),
        ({"python3": {"old"}, "python3.12": set()}, "python3.12"),
        ({"python3": {"old"}, "python3.13": {"old"}, "python3.14": set()}, "python3.14"),
        ({"python": set()}, "python"),
    ],
)
def test_an_old_python_in_front_is_passed_over(pythons: dict[str, set[str]], found: str, folder: Path) -> None:
    done = find(folder, pythons)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(folder / found)


@pytest.mark.parametrize(
    ("pythons", "variables", "said"),
    [
        ({}, {}, "no Python 3.11 to 3.14 found. Install one"),
        ({"python3": {"old"}, "python": {"old"}}, {}, "no Python 3.11 to 3.14 found. Install one"),
        ({"python3": {"old"}}, {"PYTHON": "python3"}, "PYTHON=python3 is not a working Python 3.11 to 3.14."),
        ({"python3": set()}, {"PYTHON": "/none/python"}, "PYTHON=/none/python is not a working Python"),
        ({"python3": {"no_venv"}}, {}, "python3 cannot make virtual environments. Install its venv module"),
        ({"python3": {"no_headers"}}, {}, "python3 has no C headers (Python.h). Install them"),
        ({"python3": set()}, {"CXX": "none++ -O2"}, "no C++ compiler found. Install one with C++20"),
    ],
)
def test_what_is_missing_is_named(
    pythons: dict[str, set[str]], variables: dict[str, str], said: str, folder: Path
) -> None:
    done = find(folder, pythons, **variables)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"quire: {said}")
    assert done.stderr.count("\n") == 1


def test_no_compiler(folder: Path) -> None:
    os.unlink(folder / "c++")
    assert "no C++ compiler found" in find(folder, {"python3": set()}).stderr
