"""Device: what a machine reads and computes per second, and the fixed costs of a step; a table, or a JSON file.

The table is devices.toml. Its rates are those of the makers' data sheets; the shares of them that programs reach are
round assumptions. Measured figures belong in a JSON file with the same field names:

    {"name": "mine", "memory": 25769803776, "bandwidth": 2.2e10, "matrix_rate": 2.0e11, "step_overhead": 0.002}

`quire plan --measure FILE` writes one for the machine it runs on. There, curves (`products`) replace the roofline: a
processor's time for a matrix product does not grow linearly with the number of rows, and depends on how weights are
stored.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from quire.errors import ConfigError
from quire.simulation.model_shapes import ModelShape

_GIB = 2**30

PROCESS_BYTES = 250 * 2**20
"""Interpreter, torch without CUDA and other libraries; used where they were not measured."""
MEMORY_SHARE = 0.9
"""Share of a device's memory for weights and KV; the rest is for activations and the driver. Also vLLM's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Coefficients of one device. Raises `ConfigError` for an impossible value."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second read from memory."""
    matrix_rate: float
    """Floating-point operations per second in matrix products; a multiplication with its addition counts as two."""
    bandwidth_share: float = 1.0
    """Share of `bandwidth` that programs reach; 1 if it was measured."""
    matrix_share: float = 1.0
    """Share of `matrix_rate` that programs reach; 1 if it was measured."""
    step_overhead: float = 0.0
    """Seconds per step besides computing: scheduling, launches, sampling."""
    sequence_overhead: float = 0.0
    """Seconds per sequence of a step besides computing."""
    link_bandwidth: float = 0.0
    """Bytes per second between devices that share a model, per direction."""
    reduce_latency: float = 0.0
    """Seconds of one all-reduce of a few bytes; a layer does two."""
    host_bandwidth: float = 0.0
    """Bytes per second between the device and host memory; 0: the device computes in host memory."""
    layer_overhead: float = 0.0
    """Seconds per layer of a step besides computing."""
    element_time: float = 0.0
    """Seconds per element that layers pass to each other for a token: norms, activations, rotations."""
    logit_time: float = 0.0
    """Seconds per logit of a sampled position."""
    process_memory: float = 0.0
    """Bytes of a process before it holds any part of a model: interpreter and libraries."""
    capability: tuple[int, int] = (8, 0)
    """Compute capability of a CUDA device, which decides its kernels."""
    source: str = ""
    """Where the figures come from."""
    products: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """Weight format (a dtype or a quantisation) → pairs (rows, seconds per parameter) in ascending order: the time of a
    matrix product by its number of rows, linear in between and beyond. `bandwidth` and `matrix_rate` then apply to
    attention only. Empty: they are a roofline for both."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name in ("name", "products", "source"):
                continue
            if entry.name == "capability":
                self._check_capability(value)
                continue
            if not _is_amount(value):
                raise ConfigError(f"device {self.name}: {entry.name} is {value!r}; it must be a number of at least 0")
        for weight_format, curve in self.products.items():
            points = [tuple(point) for point in curve]
            sound = all(len(point) == 2 and _is_amount(point[0]) and _is_amount(point[1]) for point in points)
            if not sound or len(points) < 2 or any(a[0] >= b[0] or a[1] > b[1] for a, b in pairwise(points)):
                raise ConfigError(
                    f"device {self.name}: products of {weight_format} is {list(curve)!r}; it must be two or more pairs "
                    "of rows and seconds per parameter, both ascending"
                )
        for name in ("memory", "bandwidth", "matrix_rate", "bandwidth_share", "matrix_share"):
            if getattr(self, name) == 0:
                raise ConfigError(f"device {self.name}: {name} is 0; it must be more")

    def _check_capability(self, value: object) -> None:
        """Also make a tuple of a file's list."""
        if not (isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, int) for part in value)):
            raise ConfigError(f"device {self.name}: capability is {value!r}; it must be two numbers such as [8, 0]")
        object.__setattr__(self, "capability", tuple(value))

    @property
    def is_host(self) -> bool:
        """The device computes in host memory, which it shares with other programs."""
        return self.host_bandwidth == 0

    def to_json(self) -> str:
        """The text of a file that `find_device` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _card(name: str, values: Mapping[str, Any]) -> Device:
    return Device(
        name=name,
        memory=_memory(values),
        bandwidth=values["bandwidth"] * 1e9,
        matrix_rate=values["fp16"] * 1e12,
        bandwidth_share=0.85,
        matrix_share=0.55,
        step_overhead=0.002,
        sequence_overhead=5e-6,
        link_bandwidth=values["link"] * 1e9,
        reduce_latency=1e-5,
        host_bandwidth=values["host"] * 1e9,
        capability=values["capability"],
        source=values["source"],
    )


def _processor(name: str, values: Mapping[str, Any]) -> Device:
    return Device(
        name=name,
        memory=_memory(values),
        bandwidth=values["bandwidth"] * 1e9,
        matrix_rate=values["cores"] * values["ghz"] * values["per_cycle"] * 1e9,
        bandwidth_share=0.75,
        matrix_share=0.6,
        step_overhead=0.002,
        sequence_overhead=5e-6,
        process_memory=PROCESS_BYTES,
        source=values["source"],
    )


def _memory(values: Mapping[str, Any]) -> float:
    return float(values["memory_gb"] * 1e9 if "memory_gb" in values else values["memory_gib"] * _GIB)


def _read_table() -> dict[str, Device]:
    with (Path(__file__).parent / "devices.toml").open("rb") as file:
        rows = tomllib.load(file)
    return {name: (_card if "fp16" in values else _processor)(name, values) for name, values in rows.items()}


DEVICES = _read_table()
"""Name → device, cards first."""

_TABLE_1 = {
    ("OPT-13B", "A100-40GB", 1): 12 * _GIB,
    ("LLaMA-13B", "A100-40GB", 1): 12 * _GIB,
    ("OPT-66B", "A100-40GB", 4): 21 * _GIB,
    ("OPT-175B", "A100-80GB", 8): 264 * _GIB,
}
"""KV memory in the paper's table 1: (model, device, number of devices) → bytes."""


def find_device(name: str) -> Device:
    """A known device (case, spaces and hyphens do not matter), or one from a JSON file. Raises `ConfigError`."""
    known = {_letters(each): device for each, device in DEVICES.items()}
    wanted = _letters(name)
    if wanted in known:
        return known[wanted]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"device is {name!r}; {_near(wanted)}it must be a name that quire plan --list-devices shows, or a JSON "
            "file such as quire plan --measure FILE writes"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Device(**{"name": path.stem, **values})
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"device file {path}: {error}") from error


def _near(letters: str) -> str:
    """The known names that somebody may have meant, as part of an error; "" if there are none."""
    known = {_letters(name): name for name in DEVICES}
    alike = [each for each in known if letters and letters in each]
    alike = alike or difflib.get_close_matches(letters, known, n=3)
    return f"did you mean {' or '.join(known[each] for each in alike[:4])}? " if alike else ""


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def fewest_devices(model: ModelShape, device: Device) -> int:
    """The smallest power of two of devices that hold the weights. Raises `ConfigError` if 4096 do not."""
    count = 1
    while count * device.memory * MEMORY_SHARE <= model.weight_bytes:
        count *= 2
        if count > 4096:
            raise ConfigError(
                f"{model.name} does not fit any number of {device.name}; its memory is {device.memory:g} B"
            )
    return count


def kv_bytes_left(model: ModelShape, device: Device, num_devices: int) -> int:
    """Bytes for KV on all devices. Raises `ConfigError` if the weights leave none."""
    printed = _TABLE_1.get((model.name, device.name, num_devices))
    if printed is not None:
        return printed
    left = int(num_devices * device.memory * MEMORY_SHARE) - model.weight_bytes
    if left < model.kv_bytes_per_token:
        raise ConfigError(
            f"{model.name} takes {model.weight_bytes / _GIB:.1f} GiB, but {num_devices} {device.name} have "
            f"{num_devices * device.memory * MEMORY_SHARE / _GIB:.1f} GiB to use; set num_devices or another device"
        )
    return left
