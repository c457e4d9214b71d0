"""Levels: the numbers that codes of few bits stand for. No torch."""

import math

Levels = tuple[float, ...]
"""The number of each code: 16 of codes of 4 bits, 256 of codes of 8."""


def integers(bits: int, zero: int = 0) -> Levels:
    """Codes of 4 or 8 bits stand for themselves less `zero`."""
    return tuple(float(code - zero) for code in range(2**bits))


SIGNED_BYTES: Levels = tuple(float(code - 256 if code > 127 else code) for code in range(256))
"""Codes of 8 bits are integers with a sign (two's complement)."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1: Levels = (*_E2M1, *(-number for number in _E2M1))
"""Floats of 4 bits: two of exponent, one of mantissa, and a sign."""


MXFP4_BLOCK = 32
"""Numbers of 4 bits that share a scale of a byte in MXFP4."""


def _e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    if code & 127 == 127:
        return math.nan
    return -magnitude if code & 128 else magnitude


E4M3: Levels = tuple(map(_e4m3, range(256)))
"""Floats of 8 bits: four of exponent, three of mantissa, and a sign; codes 127 and 255 are NaN."""
