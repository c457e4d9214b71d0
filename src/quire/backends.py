"""BACKENDS: a table of the ways to compute a model, and the choice among them. No torch.

A backend is a kernel module with the planner of its attention. The option `attention_backend` names it, by vLLM's name
where vLLM has one. The row says what follows from the choice: KV types, block size, activation types.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType

from quire.errors import ConfigError

DEVICES = ("cpu", "cuda", "mps")
KV_CACHE_DTYPES = ("float32", "float16", "bfloat16", "int8", "fp8_e4m3")
"""Types that KV may be stored in; a backend has some of them."""
GATHERED_SLOTS = 2**17
"""KV slots that the sdpa backend gathers at a time: 128 sequences of 1,024 tokens. A longer sequence runs alone."""
MAX_CAPTURED_TOKENS = 512
"""Most tokens of a captured step. Larger batches keep a GPU busy without graphs."""
MAX_NARROW_TOKENS = 8
"""Most new tokens of a sequence that a GPU's planner treats as decode, and of a sequence in a captured step: their rows
fill less than one tile of prefill."""
PARTS_WORKSPACE = 96 * 2**20
"""Bytes of the Triton kernels' plans and parts of split keys, for 256 sequences and 32 heads."""
EXPANSION_WORKSPACE = 64 * 2**20
"""Most bytes for the keys and values computed from a sequence's latent rows (`quire.attention.expansion`)."""
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
    """Packages that must be installed beside Quire's own dependencies."""
    block_size: int = 64
    """Default number of tokens per block."""
    block_sizes: tuple[int, ...] = ()
    """Block sizes that it takes; empty: all."""
    min_capability: tuple[int, int] = (0, 0)
    """Lowest compute capability of a CUDA device that it runs on."""
    float8_capability: tuple[int, int] = (0, 0)
    """Lowest compute capability of a CUDA device on which it stores KV in float8."""
    float32_activations: bool = False
    """If true, activations are float32 whatever the weights are; else they follow `dtype`."""
    gathered_slots: int = 0
    """KV slots of one layer that its attention copies at a time."""
    workspace: int = 0
    """Bytes of scratch memory that its attention takes on the device, beside the above."""
    sampling: str = ""
    """Module of its sampling kernels (see `quire.sampling.device_sampler.SamplingKernels`); empty: torch samples."""
    quantizes: bool = False
    """Whether its kernels have int8 and int4 layers."""
    deterministic: bool = False
    """Whether it can compute a sequence so that no bit of the result depends on the batch."""
    replans: bool = False
    """Whether a step may have a second plan, for its output tokens: plans are not in fixed buffers."""
    keeps_mxfp4: bool = False
    """Whether its kernels multiply MXFP4; else such weights become floats."""
    keeps_codes: bool = False
    """Whether its kernels multiply the codes of checkpoints of few bits; else such weights become floats."""
    lacks: tuple[str, ...] = ()
    """Kinds of attention that it does not compute; see `ModelConfig.attention_needs`."""
    captures: bool = False
    """Whether its steps can be captured as CUDA graphs: its plans are in fixed buffers."""


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
            keeps_mxfp4=True,
            keeps_codes=True,
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
            lacks=("attention sinks", "latent attention", "images seen from both sides"),
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


def has_package(name: str) -> bool:
    """Whether a package is installed."""
    return find_spec(name) is not None


def choose_backend(
    name: str,
    device: str,
    capability: tuple[int, int] = (0, 0),
    has_package: Callable[[str], bool] = has_package,
    needs: tuple[str, ...] = (),
) -> str:
    """The backend that the option `attention_backend` means on a device. Raises `ConfigError` if it cannot run there.

    `capability` is that of a CUDA device, such as (8, 0); `needs` are the model's `attention_needs`.
    """

    def obstacle(row: Backend) -> str:
        if device not in row.devices:
            return f"runs on {', '.join(row.devices)}, but device is {device}"
        if device == "cuda" and capability < row.min_capability:
            needed, found = (".".join(map(str, version)) for version in (row.min_capability, capability))
            return f"needs a CUDA device of capability {needed}, but this one has {found}"
        for kind in needs:
            if kind in row.lacks:
                return f"does not compute {kind}, which this model has"
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
