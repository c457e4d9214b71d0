#!/bin/sh
# Test the GPU kernels without a GPU: in Triton's interpreter, and compiled for the GPUs they are meant for.
# Makes .venv-gpu, which is .venv with Triton in front. With --if-possible a machine that cannot have it is told why,
# and nothing fails.
set -eu
cd "$(dirname "$0")/.."
env=.venv-gpu
needed_gib=5

give_up() {
    echo "quire: the GPU kernels were NOT tested: $1"
    [ "${if_possible:-}" ] && exit 0
    exit 1
}

if [ "${1:-}" = --if-possible ]; then
    if_possible=yes
    shift
fi

if ! cmp -s constraints-gpu.txt "$env/.installed"; then
    [ "$(uname -s)" = Linux ] || give_up "Triton runs on Linux only"
    free_gib=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free_gib" -ge "$needed_gib" ] || give_up "Triton's environment needs $needed_gib GiB of disk, $free_gib are free"
    echo "quire: installing Triton into $env (once; about 200 MB to fetch)"
    rm -rf "$env"
    .venv/bin/python -m venv "$env"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check -r constraints-gpu.txt ||
        give_up "the packages of constraints-gpu.txt could not be installed"
    # Last, so that pip saw nothing of .venv: everything but Triton and NumPy comes from there.
    packages=$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    own=$("$env/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    echo "import site; site.addsitedir('$packages')" > "$own/quire.pth"
    cp constraints-gpu.txt "$env/.installed"
fi

echo "quire: testing the GPU kernels without a GPU"
PYTHONPATH=src CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 exec "$env/bin/python" -m pytest --numprocesses auto \
    --dist worksteal tests/kernels/triton tests/gpu "$@"
