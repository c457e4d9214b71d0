"""BACKENDS: the ways a model can be computed, one row each, and the choice among them. No torch.

A backend is a kernel module and the planner of its attention; the option `attention_backend` names it, by vLLM's name
where vLLM has one. What follows from the choice (KV types, block size, what activations are kept in) stands in the row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType

from quire.errors import ConfigError

DEVICES = ("cpu", "cuda", "mps")
KV_CACHE_DTYPES = ("float32", "float16", "bfloat16", "int8", "fp8_e4m3")
"""What KV may be stored in, where a backend can."""
GATHERED_SLOTS = 2**17
"""KV slots that the sdpa backend gathers at once: 128 sequences of 1,024 tokens. A longer sequence runs alone."""
MAX_CAPTURED_TOKENS = 512
"""The most tokens that a captured step has room for: larger batches keep a GPU busy without."""
MAX_NARROW_TOKENS = 8
"""New tokens up to which a GPU's planner takes a sequence as decode, and the most of one sequence in a captured step:
their rows fill less than one tile of prefill."""
PARTS_WORKSPACE = 96 * 2**20
"""Bytes that the Triton kernels keep plans and the parts of split keys in, of 256 sequences and 32 heads."""
_PLAIN = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A row of BACKENDS."""

    kernels: str
    """The module that offers `quire.kernels.interface.Kernels`."""
    planner: str
    """What makes the planner of its attention, as "module:name" (see `quire.attention.planners`)."""
    devices: tuple[str, ...]
    kv_cache_dtypes: tuple[str, ...] = _PLAIN
    packages: tuple[str, ...] = ()
    """What must be installed for it beside Quire's own dependencies."""
    block_size: int = 64
    """Tokens per block if not told otherwise."""
    block_sizes: tuple[int, ...] = ()
    """Those it takes; empty: all."""
    min_capability: tuple[int, int] = (0, 0)
    """The oldest CUDA device it runs on."""
    float8_capability: tuple[int, int] = (0, 0)
    """The oldest CUDA device that it stores KV in 8-bit floats on."""
    float32_activations: bool = False
    """Activations are float32 whatever weights are stored in; otherwise they follow `dtype`."""
    gathered_slots: int = 0
    """KV slots of one layer that its attention copies at once."""
    workspace: int = 0
    """Bytes of the device that its attention works in, beside all that."""
    sampling: str = ""
    """The module of its sampling kernels (see `quire.sampling.device_sampler.SamplingKernels`); else torch draws."""
    quantizes: bool = False
    """Whether its kernels have layers of few bits."""
    deterministic: bool = False
    """Whether it can compute a sequence without a bit of it depending on the batch."""
    replans: bool = False
    """Whether a step may have a second plan, for the tokens that are read: plans do not lie in buffers that stay."""
    captures: bool = False
    """Whether its steps can be captured as CUDA graphs: its plans lie in buffers that stay."""


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "cpu": Backend(
            kernels="quire.kernels.cpu",
            planner="quire.attention.planners:CpuPlanner",
            devices=("cpu",),
            kv_cache_dtypes=(*_PLAIN, "int8"),
            block_size=16,
            float32_activations=True,
            quantizes=True,
            deterministic=True,
            replans=True,
        ),
        "triton": Backend(
            kernels="quire.kernels.triton",
            planner="quire.attention.planners:gpu_planner",
            devices=("cuda",),
            packages=("triton",),
            kv_cache_dtypes=(*_PLAIN, "fp8_e4m3"),
            min_capability=(8, 0),
            float8_capability=(8, 9),
            sampling="quire.kernels.triton.sampling",
            block_sizes=tuple(range(16, 257, 16)),
            workspace=PARTS_WORKSPACE,
            captures=True,
        ),
        "sdpa": Backend(
            kernels="quire.kernels.sdpa",
            planner="quire.attention.planners:sdpa_planner",
            devices=DEVICES,
            kv_cache_dtypes=(*_PLAIN, "fp8_e4m3"),
            gathered_slots=GATHERED_SLOTS,
            replans=True,
        ),
    }
)
"""In order of preference on each device."""


def choose_backend(
    name: str,
    device: str,
    capability: tuple[int, int] = (0, 0),
    has_package: Callable[[str], bool] = lambda package: find_spec(package) is not None,
) -> str:
    """The backend that the option `attention_backend` means on a device. Raises `ConfigError` for one that cannot be.

    `capability` is that of a CUDA device, such as (8, 0).
    """

    def obstacle(row: Backend) -> str:
        if device not in row.devices:
            return f"runs on {', '.join(row.devices)}, but device is {device}"
        if device == "cuda" and capability < row.min_capability:
            needed, found = (".".join(map(str, version)) for version in (row.min_capability, capability))
            return f"needs a CUDA device of capability {needed}, but this one has {found}"
        for package in row.packages:
            if not has_package(package):
                return f"needs the package {package}, which is not installed"
        return ""

    possible = [other for other, row in BACKENDS.items() if not obstacle(row)]
    if name == "auto":
        return possible[0]
    if reason := obstacle(BACKENDS[name]):
        raise ConfigError(f"attention_backend is {name}, which {reason}; choose {' or '.join(possible)}")
    return name
