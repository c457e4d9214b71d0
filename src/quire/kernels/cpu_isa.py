"""cpu_isa: which of the builds of the CPU kernels is used, one for each instruction set."""

import logging
import os

from quire.errors import ConfigError
from quire.kernels import _cpu

logger = logging.getLogger(__name__)

_ISAS = ("portable", "avx2", "avx512", "avx512vnni", "avx512bf16")


def isa() -> str:
    """The instruction set in use: "avx512bf16", "avx512vnni", "avx512", "avx2" or "portable"."""
    return _cpu.isa()


describe = isa


def supported_isas() -> list[str]:
    """The instruction sets this CPU can run, best first."""
    return _cpu.supported_isas()


def use_isa(name: str) -> None:
    """Use another build of every kernel from now on, in the whole process.

    Raises `ConfigError` if this CPU cannot run it or it fails its self-test; no other build is used in its place.
    """
    if name not in supported_isas():
        reason = "this CPU does not support it" if name in _ISAS else "unknown"
        raise ConfigError(f"QUIRE_CPU_ISA={name}: {reason}; choose one of {', '.join(reversed(supported_isas()))}")
    if (fault := _cpu.fault(name)) is not None:
        raise ConfigError(
            f"QUIRE_CPU_ISA={name}: these kernels fail their test on this machine ({fault}); leave it unset, and the "
            "best that pass are used"
        )
    _cpu.use_isa(name)


def use_best_isa() -> None:
    """Use the best build that passes its self-test on this machine; the test takes a millisecond.

    A hypervisor may report instructions that the machine cannot run. Raises `ConfigError` if no build passes.
    """
    for name in supported_isas():
        fault = _cpu.fault(name)
        if fault is None:
            return _cpu.use_isa(name)
        logger.warning("the %s kernels fail their test on this machine (%s); they are not used", name, fault)
    raise ConfigError("no build of the CPU kernels passes its test on this machine; build Quire anew from source")


if "QUIRE_CPU_ISA" in os.environ:
    use_isa(os.environ["QUIRE_CPU_ISA"])
else:
    use_best_isa()
