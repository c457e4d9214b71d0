#!/bin/sh
# Builds the kernels with the sanitizers for addresses and undefined behaviour (GCC or Clang on Linux) into build/asan,
# and runs their tests on them. Arguments go to pytest. The first build takes some ten minutes.
set -eu
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
.venv/bin/cmake -S . -B build/asan -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" \
  -DPython_EXECUTABLE="$python" -DQUIRE_SANITIZE=ON > build/asan-configure.log || { cat build/asan-configure.log; exit 1; }
.venv/bin/cmake --build build/asan
# Python itself has no sanitizer, so the library must be loaded before it. Python keeps memory until it ends, which is
# no leak of the kernels. What sanitizers write must not be captured: the process ends with it.
export LD_PRELOAD="$("${CXX:-c++}" -print-file-name=libasan.so) $("${CXX:-c++}" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
exec "$python" -m pytest -q --capture=no -p tests.kernels.sanitized ${*:-tests/kernels --ignore tests/kernels/triton}
