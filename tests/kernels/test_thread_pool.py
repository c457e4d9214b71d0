"""The threads that share a kernel's tasks: results do not depend on how many there are, or which runs late."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quire.kernels import cpu

WIDTH = 1024


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_product(rows: int) -> tuple[Tensor, Tensor]:
    """An input, and a packed weight of [WIDTH, WIDTH]."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(rows, WIDTH, generator=random)
    return x, cpu.pack_linear([torch.randn(WIDTH, WIDTH, generator=random)], "float32")


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_any_number_of_threads_gives_the_same_bits(rows: int) -> None:
    torch.set_num_threads(1)
    x, weight = make_product(rows)
    expected = cpu.linear(x, weight, None, WIDTH)
    for threads in (2, 3, 16, 2):
        torch.set_num_threads(threads)
        for _ in range(20):
            assert torch.equal(cpu.linear(x, weight, None, WIDTH), expected)


def test_callers_at_the_same_time() -> None:
    """One caller has the threads, the others do their tasks themselves."""
    x, weight = make_product(4)
    expected = cpu.linear(x, weight, None, WIDTH)
    equal: list[bool] = []

    def call() -> None:
        torch.set_num_threads(2)
        equal.append(all(torch.equal(cpu.linear(x, weight, None, WIDTH), expected) for _ in range(50)))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert equal == [True] * 4


def test_a_forked_process_has_threads_of_its_own() -> None:
    program = (
        "import os, torch\n"
        "from quire.kernels import cpu\n"
        "torch.set_num_threads(2)\n"
        "weight = cpu.pack_linear([torch.ones(1024, 1024)], 'float32')\n"
        "assert cpu.linear(torch.ones(1, 1024), weight, None, 1024).sum() == 1024 * 1024\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(0 if cpu.linear(torch.ones(1, 1024), weight, None, 1024).sum() == 1024 * 1024 else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_idle_threads_sleep() -> None:
    torch.set_num_threads(4)
    x, weight = make_product(1)
    cpu.linear(x, weight, None, WIDTH)
    time.sleep(0.05)
    began = sum(os.times()[:2])
    time.sleep(0.5)
    assert sum(os.times()[:2]) - began < 0.1
