"""The distribution: its metadata, what the kernels need of a system, and the wheels of dist/ without a compiler.

The last needs `make wheels` first, and QUIRE_TEST_WHEEL (`make test-wheel`): it installs torch.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from quire import __version__
from scripts.show_build import main as show_build
from scripts.show_build import progress

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
MAX_WHEEL_BYTES = 10 * 2**20
MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
"""The newest versions of symbols that a system of that tag has to have."""

slow = pytest.mark.skipif(not os.environ.get("QUIRE_TEST_WHEEL"), reason="make wheels test-wheel")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    read: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return read


def test_the_distribution_has_its_own_name(project: dict[str, Any]) -> None:
    assert project["project"]["name"] == "quire-llm"
    assert project["project"]["scripts"] == {"quire": "quire.__main__:main"}
    assert project["tool"]["scikit-build"]["wheel"]["packages"] == ["src/quire"]
    assert "build-dir" not in project["tool"]["scikit-build"], "two builds in one checkout would meet there"


def test_extras_that_texts_name_exist(project: dict[str, Any]) -> None:
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.py")]
    named = {
        (name, extra)
        for path in texts
        for name, extras in re.findall(r"\b(quire[\w-]*)\[([a-z,]+)\]", path.read_text())
        for extra in extras.split(",")
        if "pip install" in path.read_text() or path.suffix == ".md"
    }
    assert {("quire-llm", "otel"), ("quire-llm", "images")} <= named
    assert named <= {("quire-llm", extra) for extra in project["project"]["optional-dependencies"]}


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("  Downloading torch-2.13.0-cp311.whl (191.2 MB)", "downloading torch-2.13.0-cp311.whl (191.2 MB)"),
        (
            "  [1/13] Building CXX object x/quire_kernels_avx2.dir/csrc/kernels.cpp.o",
            "[1/13] compiling the kernels for avx2",
        ),
        (
            "[2/13] Building CXX object x/_cpu.dir/csrc/bindings/lora.cpp.o",
            "[2/13] compiling csrc/bindings/lora.cpp",
        ),
        ("[13/13] Linking CXX shared module _cpu.so", "[13/13] linking"),
        ("Collecting torch>=2.11", None),
        ("", None),
    ],
)
def test_a_build_shows_what_it_does(line: str, shown: str | None) -> None:
    assert progress(line) == shown


def test_a_build_that_fails_shows_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "import sys; print('[1/2] Linking'); print('the reason'); sys.exit(7)"]
    assert show_build(tmp_path / "log", command) == 7
    shown = capfd.readouterr()
    assert shown.out == "quire: [1/2] linking\n"
    assert "the reason" in shown.err
    assert (tmp_path / "log").read_text() == "[1/2] Linking\nthe reason\n"


def needed_symbols(library: Path) -> set[tuple[str, tuple[int, ...]]]:
    """The versions of symbols that a library takes from the system."""
    shown = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    return {
        (family, tuple(map(int, version.split("."))))
        for family, version in re.findall(r"\*UND\*.*\((GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)\)", shown)
    }


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the wheels are for x86-64")
def test_the_kernels_need_nothing_newer_than_manylinux_2_28() -> None:
    from quire.kernels import _cpu

    needed = needed_symbols(Path(_cpu.__file__))
    assert {family for family, _ in needed} == set(MANYLINUX_2_28)
    assert [(family, version) for family, version in needed if version > MANYLINUX_2_28[family]] == []


def wheels() -> list[Path]:
    return sorted(DIST.glob(f"quire_llm-{__version__}-*.whl"))


@slow
def test_wheels_are_small_and_an_sdist_is_there() -> None:
    assert wheels()
    for wheel in wheels():
        assert re.search(r"-manylinux_2_\d+_x86_64\.whl$", wheel.name)
        assert wheel.stat().st_size <= MAX_WHEEL_BYTES
    assert (DIST / f"quire_llm-{__version__}.tar.gz").exists()


@slow
@pytest.mark.parametrize("python", ["python3.11", "python3.12", "python3.13", "python3.14"])
def test_a_wheel_serves_where_there_is_no_compiler(python: str, tmp_path: Path) -> None:
    """In a new environment, from the wheel and the index alone: the same text as this checkout generates."""
    found = shutil.which(python)
    if found is None or subprocess.run([found, "-c", ""], check=False).returncode:
        pytest.skip(f"{python} is not here")
    subprocess.run([found, "-m", "venv", tmp_path / "venv"], check=True)
    programs = tmp_path / "venv/bin"
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "HTTP", "SSL", "HOME"))}
    environment = {**kept, "PATH": str(programs), "CC": "/none", "CXX": "/none", "OMP_NUM_THREADS": "1"}
    install = [programs / "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", "--find-links", DIST]
    subprocess.run([*install, "--only-binary", "quire-llm", f"quire-llm=={__version__}"], env=environment, check=True)

    question = [
        "generate",
        "ROMEO:",
        "--max-tokens",
        "12",
        "--temperature",
        "0",
        "--threads",
        "1",
        "--dtype",
        "float32",
    ]

    def said(*command: str | Path, **variables: str) -> str:
        done = subprocess.run(command, env={**environment, **variables}, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert said(programs / "quire", "--version").strip() == __version__
    here = said(sys.executable, "-m", "quire", *question, PYTHONPATH=os.pathsep.join(sys.path))
    assert said(programs / "quire", *question) == here
