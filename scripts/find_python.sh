#!/bin/sh
# Prints the path of a Python that can build and run Quire, or says what to install. `PYTHON` in the environment decides.
set -eu

fail() { printf 'quire: %s\n' "$*" >&2; exit 1; }

works() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    works "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11 to 3.14."
    found=$PYTHON
else
    found=
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
        if works "$candidate"; then found=$candidate; break; fi
    done
    [ -n "$found" ] || fail "no Python 3.11 to 3.14 found. Install one (Debian, Ubuntu: apt install python3" \
        "python3-venv python3-dev; Fedora: dnf install python3 python3-devel) or name it: make PYTHON=/path/to/python"
fi

"$found" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$found cannot make virtual environments. Install its venv module (Debian, Ubuntu: apt install python3-venv)."
"$found" -c 'import pathlib, sys, sysconfig
sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())' ||
    fail "$found has no C headers (Python.h). Install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)."
compiler=${CXX:-}
if [ -z "$compiler" ]; then
    for candidate in c++ g++ clang++; do
        if command -v "$candidate" >/dev/null 2>&1; then compiler=$candidate; break; fi
    done
fi
# CXX may carry flags; its first word is the program.
[ -n "$compiler" ] && command -v "${compiler%% *}" >/dev/null 2>&1 ||
    fail "no C++ compiler found. Install one with C++20 (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or set CXX."

"$found" -c 'import sys; print(sys.executable)'
