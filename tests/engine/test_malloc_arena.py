"""The memory of activations stays with the process until the engine closes. Each test runs its own process, because
malloc's settings apply to the whole process."""

import subprocess
import sys

import pytest

COUNT_FAULTS = """
import ctypes, resource, threading
import torch
from quire.engine import malloc_arena

def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):  # as layers do: some live on while others come and go
        kept = torch.ones(megabytes, 1 << 18)
        torch.ones(2 * megabytes, 1 << 18)
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():  # without the pages of files, which the system takes back as it likes
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) >> 10 for line in file if line.startswith("RssAnon"))

torch.set_num_threads(1)
faults(1)
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS + program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")


def test_no_layer_asks_the_system_for_memory() -> None:
    before, *after = map(
        int,
        run("""
print(faults(40))
arena = malloc_arena.MallocArena(300 << 20, 200 << 20)
thread = threading.Thread(target=arena.take_pages, args=(lambda: False,))
thread.start()
thread.join()
arena.free()
for megabytes in (8, 40):
    faults(megabytes)  # the heap may grow a little, once
for megabytes in (8, 40):
    print(faults(megabytes))
""").split(),
    )
    assert before > 10_000, "else there is nothing to keep"
    assert max(after) < 300


def test_taking_pages_can_be_stopped_and_what_was_taken_is_used() -> None:
    taken, opened, used = map(
        int,
        run("""
heap_bytes = 512 << 20
answers = iter([False] * 200 + [True])
before = resident()
arena = malloc_arena.MallocArena(2 * heap_bytes, heap_bytes)
arena.take_pages(lambda: next(answers))
print(resident() - before)
arena.free()
arena.free()
print(resident() - before)
torch.ones(150, 1 << 18)
print(resident() - before)
""").split(),
    )
    assert 150 < taken < 250
    assert opened > 150
    assert used < 250, "150 MiB more, had they been taken anew"


def test_closing_gives_it_back() -> None:
    kept, left = map(
        int,
        run("""
malloc_arena.MallocArena(1 << 30, 1 << 20).free()
before = resident()
torch.ones(200, 1 << 18)
print(resident() - before)
malloc_arena.release()
print(resident() - before)
""").split(),
    )
    assert kept > 150
    assert left < 20
