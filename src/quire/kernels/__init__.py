"""Everything a model computes, per device: paged attention, KV writes, dense layers, norms, sampling."""

from importlib import import_module

from quire.backends import BACKENDS
from quire.kernels.interface import AttentionParams, AttentionPlan, Kernels, KVLayer, OutputTokens

__all__ = ["AttentionParams", "AttentionPlan", "KVLayer", "Kernels", "OutputTokens", "kernels_for"]


def kernels_for(backend: str, *, encoder: bool = False) -> Kernels:
    """The kernel module of a backend of BACKENDS, imported only when asked for. Call it once, at start. `encoder`: for
    an encoder whose results may depend on the batch."""
    if backend not in BACKENDS:
        raise ValueError(f"no kernels for {backend!r}; there are kernels for {', '.join(map(repr, BACKENDS))}")
    row = BACKENDS[backend]
    kernels: Kernels = import_module((encoder and row.encoder_kernels) or row.kernels)
    return kernels
