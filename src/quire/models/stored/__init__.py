"""Checkpoints that store dense layers in few bits: their tensors, read as matrices of codes and scales.

`quire.quantization.stored` reads what the config says. `layouts` has the table of ways that tensors lie; `layers` the
source of tensors that models are built from; `sizes`, without torch, the memory that follows.
"""
