"""Perplexity of real models per format, beside llama.cpp's on the same weights where QUIRE_LLAMA names its programs."""

import os
from pathlib import Path

import pytest

from benchmarks.perplexity_peers import FLOATS, Figure, measure
from tests.real.real_models import SMOLLM2, gemma

pytestmark = pytest.mark.skipif("QUIRE_TEST_REAL" not in os.environ, reason="make test-real downloads real models")

LLAMA = Path(os.environ["QUIRE_LLAMA"]) if "QUIRE_LLAMA" in os.environ else None
"""A folder with llama-quantize and llama-perplexity."""
NOISE = 0.04
"""Figures of two engines, which score other tokens of each row."""


def changes(found: dict[str, Figure]) -> dict[str, float]:
    """Form → by how much its perplexity is above that of the floats, in Quire."""
    floats = found[FLOATS].ours
    assert floats is not None
    return {form: figure.ours / floats - 1 for form, figure in found.items() if figure.ours is not None}


def test_smollm2_per_format(tmp_path: Path) -> None:
    found = measure(SMOLLM2, tmp_path, llama=LLAMA, forms=("int8", "int4", "Q4_K_M"), num_tokens=512, row_length=256)
    change = changes(found)
    assert abs(change["int8"]) <= 0.01
    assert change["int4"] <= 0.02
    if "Q4_K_M" not in found:
        pytest.skip("QUIRE_LLAMA names no folder with the programs of llama.cpp, so nothing is compared")
    assert change["int4"] <= change["Q4_K_M"]
    floats, theirs = found[FLOATS].llama, found["Q4_K_M"].llama
    assert floats is not None
    assert theirs is not None
    # The file means the same to both: what it costs in one engine, it costs in the other.
    assert change["Q4_K_M"] == pytest.approx(theirs / floats - 1, abs=NOISE)


def test_gemma_per_format(tmp_path: Path) -> None:
    change = changes(measure(str(gemma()), tmp_path, llama=None, forms=("int8", "int4"), num_tokens=512))
    assert abs(change["int8"]) <= 0.01
    assert change["int4"] <= 0.06
