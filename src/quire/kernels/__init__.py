"""The operations torch has nothing good for: paged attention, KV writes and the small fused steps around them."""

from importlib import import_module

from quire.backends import BACKENDS
from quire.kernels.interface import AttentionPlan, Kernels, OutputTokens

__all__ = ["AttentionPlan", "Kernels", "OutputTokens", "kernels_for"]


def kernels_for(backend: str) -> Kernels:
    """The kernel module of a backend of BACKENDS, imported only when asked for. Call it once, at start."""
    if backend not in BACKENDS:
        raise ValueError(f"no kernels for {backend!r}; there are kernels for {', '.join(map(repr, BACKENDS))}")
    kernels: Kernels = import_module(BACKENDS[backend].kernels)
    return kernels
