"""Which layers a quantisation stores in how many bits: a table, and the bytes that follow. No torch.

Weights are quantised while a checkpoint of 16 or 32 bits is loaded, without calibration. Packing and products are
`quantize_linear` and `linear_quantized` of `quire.kernels`.
"""

from quire.quantization.methods import METHODS, ROTATED, Method, WeightFormat

__all__ = ["METHODS", "ROTATED", "Method", "WeightFormat"]
