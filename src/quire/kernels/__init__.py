"""Everything a model computes, per device: paged attention, KV writes, dense layers, norms, sampling."""

from importlib import import_module

from quire.backends import BACKENDS
from quire.kernels.interface import AttentionParams, AttentionPlan, Kernels, KVLayer, OutputTokens

__all__ = ["AttentionParams", "AttentionPlan", "KVLayer", "Kernels", "OutputTokens", "kernels_for"]


def kernels_for(backend: str) -> Kernels:
    """The kernel module of a backend of BACKENDS, imported only when asked for. Call it once, at start."""
    if backend not in BACKENDS:
        raise ValueError(f"no kernels for {backend!r}; there are kernels for {', '.join(map(repr, BACKENDS))}")
    kernels: Kernels = import_module(BACKENDS[backend].kernels)
    return kernels
