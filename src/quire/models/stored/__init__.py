"""Checkpoints that store dense layers in few bits: their tensors, read as matrices of codes and scales.

`quire.quantization.stored` reads what the config says. `LAYOUTS` is the table of ways that tensors lie; `StoredLayers`
is the source of tensors that models are built from.
"""

from quire.models.stored.layers import StoredLayers
from quire.models.stored.layouts import LAYOUTS

__all__ = ["LAYOUTS", "StoredLayers"]
