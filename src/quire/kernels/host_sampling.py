"""`row_argmax` and `sample_tokens` for kernel modules of devices, which sample in host memory what their device cannot.

These are the C++ kernels of `quire.kernels.cpu`, or the reference where Quire's extension is not built.
"""

from importlib.util import find_spec

if find_spec("quire.kernels._cpu") is not None:
    from quire.kernels.cpu import row_argmax, sample_tokens
else:
    from quire.kernels.reference import row_argmax, sample_tokens

__all__ = ["row_argmax", "sample_tokens"]
