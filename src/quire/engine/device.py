"""Device: facts about the device and the host's cores that are needed before torch is imported.

CUDA devices are queried through the driver library, which torch loads anyway: number of devices, name, memory and
capability. None of these needs a context on the card. The driver respects CUDA_VISIBLE_DEVICES.
"""

import ctypes
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from quire.errors import ConfigError

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
"""Attributes of cuDeviceGetAttribute."""
_NAME_BYTES = 256
_RECOUNT = 1.0
"""Seconds between two counts of the usable cores."""


@dataclass(frozen=True, slots=True)
class Device:
    """The device that Quire computes on: the first of its type."""

    type: str
    """torch's name: cpu, cuda or mps."""
    name: str = ""
    total_memory: int | None = None
    """Bytes of the device's own memory; None if it shares the host's."""
    capability: tuple[int, int] = (0, 0)
    """Compute capability of a CUDA device."""
    multiplies_bfloat16: bool = False
    """Whether a CPU reports products of pairs of bfloat16, and the kernels may use them."""
    number: int = 1
    """Devices of this kind."""
    is_here: bool = True
    """False for a device that is only planned for: packages that it needs are taken to be installed there."""


def find_device(wanted: str, *, probe: Callable[[], Device | None] | None = None) -> Device:
    """The device for the option `device`; auto is a CUDA device if there is one that torch can use.

    Raises `ConfigError` for a device that does not exist. `probe` looks for a CUDA device.
    """
    if wanted == "cpu":
        return probe_cpu()
    if wanted == "mps":
        if sys.platform != "darwin":
            raise ConfigError(f"device is mps, which is Apple's, but this is {sys.platform}; choose cpu or cuda")
        return Device("mps")
    version = importlib.metadata.version("torch")
    if version.endswith("+cpu"):
        if wanted == "cuda":
            raise ConfigError(
                f"device is cuda, but torch {version} is built without CUDA; install PyTorch's CUDA build"
            )
        return probe_cpu()
    device = (probe or probe_cuda)()
    if device is not None:
        return device
    if wanted == "cuda":
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        because = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
        raise ConfigError(f"device is cuda, but the driver shows no CUDA device{because}; choose cpu or auto")
    return probe_cpu()


def check_devices(number: int, device: Device) -> None:
    """Raise `ConfigError` if there are fewer cards than ranks of all engines; each has one of its own."""
    what = f"tensor_parallel_size times pipeline_parallel_size times data_parallel_size is {number}"
    if number > 1 and device.type == "mps":
        raise ConfigError(f"{what}, but mps is one device; leave them out")
    if number > 1 and device.type == "cuda" and device.is_here and number > device.number:
        raise ConfigError(
            f"{what}, which needs {number} CUDA devices, but the driver shows {device.number}; every rank has its own"
        )


def take_cards(index: int, number: int) -> None:
    """Let this process see the `number` cards of the engine at `index` among equal ones, before it uses any."""
    if index:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        first = index * number
        cards = [str(card) for card in range(first + number)] if visible is None else visible.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(cards[first : first + number])


def numa_nodes(root: Path = Path("/")) -> list[set[int]]:
    """The cores of each NUMA node that this process may use, without nodes where it may use none."""
    usable = os.sched_getaffinity(0)
    nodes = []
    for node in sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        cores: set[int] = set()
        for part in _read(node / "cpulist").split(","):
            first, _, last = part.partition("-")
            if first.isdecimal():
                cores.update(range(int(first), int(last or first) + 1))
        if cores & usable:
            nodes.append(cores & usable)
    return nodes


def bind_to_node(rank: int, num_ranks: int) -> None:
    """Keep this process, one of `num_ranks`, on the cores of its own NUMA node, if there is one for each rank."""
    nodes = numa_nodes() if hasattr(os, "sched_setaffinity") else []
    if num_ranks > 1 and len(nodes) == num_ranks:
        os.sched_setaffinity(0, nodes[rank])


def probe_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Device:
    """The CPU, with what `quire.kernels.cpu` will choose for it unless its self-test fails. It cannot be asked yet: it
    shares torch's OpenMP, which must be loaded first. `build_core` reports the choice."""
    try:
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "").split()
    except OSError:
        flags = []
    chosen = os.environ.get("QUIRE_CPU_ISA", "avx512bf16") == "avx512bf16"
    return Device("cpu", multiplies_bfloat16=chosen and {"avx512_bf16", "avx512_vnni"} <= set(flags))


def usable_cores(root: Path = Path("/")) -> int:
    """Number of cores to compute on, at least one: physical cores that this process may run on, limited by the CPU time
    that control groups allow (the CPU limit of a container or service).

    Two threads on one core wait for each other's arithmetic. Threads beyond a CPU limit are paused, and every barrier
    waits for them. `root` is the folder of /proc and /sys.
    """
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    topology = root / "sys/devices/system/cpu"
    cores = {_read(topology / f"cpu{number}/topology/thread_siblings_list") or str(number) for number in processors}
    return max(1, min([len(cores), *map(int, _cpu_limits(root))]))


class ThreadCount:
    """Number of threads for the next step: one per usable core. The cores are counted again after `_RECOUNT` seconds,
    since the affinity and a container's CPU limit may change while the engine runs."""

    def __init__(self, count: Callable[[], int] = usable_cores, clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._clock = count, clock
        self._counted_at, self._cores = clock(), count()

    def __call__(self) -> int:
        if (now := self._clock()) - self._counted_at >= _RECOUNT:
            self._counted_at, self._cores = now, self._count()
        return self._cores


def _cpu_limits(root: Path) -> Iterator[float]:
    """CPU limits of this process's control groups and their parents, of both cgroup versions."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        inside = PurePosixPath(path.lstrip("/"))
        for group in (inside, *inside.parents):
            if controllers:
                quota, period = (_read(mount / group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            else:
                quota, _, period = _read(mount / group / "cpu.max").partition(" ")
            if quota.isdecimal() and period.isdecimal():
                yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def probe_cuda(load: Callable[[str], Any] = ctypes.CDLL) -> Device | None:
    """The first CUDA device, or None without a driver or a device."""
    try:
        driver = load("libcuda.so.1")
    except OSError:
        return None
    count, handle, total = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    major, minor = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        return None
    calls = (
        (driver.cuDeviceGet, ctypes.byref(handle), 0),
        (driver.cuDeviceGetName, name, _NAME_BYTES, handle),
        (driver.cuDeviceTotalMem_v2, ctypes.byref(total), handle),
        (driver.cuDeviceGetAttribute, ctypes.byref(major), _CAPABILITY_MAJOR, handle),
        (driver.cuDeviceGetAttribute, ctypes.byref(minor), _CAPABILITY_MINOR, handle),
    )
    for call, *arguments in calls:
        if call(*arguments):
            # Without an answer of the card no type can be chosen for it.
            return None
    described = name.value.decode(errors="replace")
    return Device("cuda", described, total.value, (major.value, minor.value), number=count.value)
