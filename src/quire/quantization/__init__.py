"""Which layers a quantisation stores in how many bits: a table, and the arithmetic the memory plan asks for. No torch.

Weights are quantised while a checkpoint of 16 or 32 bits is loaded, without calibration. The products themselves are
`quantize_linear` and `linear_quantized` of `quire.kernels`.
"""

from quire.quantization.methods import METHODS, Method, WeightFormat

__all__ = ["METHODS", "Method", "WeightFormat"]
