"""Perplexity of real models per format, beside llama.cpp's on the same weights where QUIRE_LLAMA names its programs."""

import os
from pathlib import Path

import pytest

from benchmarks.perplexity_peers import FLOATS, measure
from tests.real.real_models import SMOLLM2, gemma

pytestmark = pytest.mark.skipif("QUIRE_TEST_REAL" not in os.environ, reason="make test-real downloads real models")

LLAMA = os.environ.get("QUIRE_LLAMA")
"""A folder with llama-quantize and llama-perplexity."""
NOISE = 0.01
"""Figures of two engines, which score other tokens of each row."""


@pytest.mark.parametrize(("model", "int8", "int4"), [("smollm2", 0.003, 0.02), ("gemma", 0.01, 0.06)])
def test_perplexity_per_format(model: str, int8: float, int4: float, tmp_path: Path) -> None:
    """`int8` and `int4`: how much of the perplexity they may cost."""
    name = SMOLLM2 if model == "smollm2" else str(gemma())
    found = measure(name, tmp_path, llama=None if LLAMA is None else Path(LLAMA), forms=("int8", "int4", "Q4_K_M"))
    floats = found[FLOATS]
    assert floats.ours is not None
    change = {form: figure.ours / floats.ours - 1 for form, figure in found.items() if figure.ours is not None}
    print(model, floats.ours, change)
    assert abs(change["int8"]) <= int8
    assert change["int4"] <= int4
    if "Q4_K_M" not in found:
        pytest.skip("QUIRE_LLAMA names no folder with the programs of llama.cpp, so nothing is compared")
    theirs = found["Q4_K_M"]
    assert floats.llama is not None
    assert theirs.llama is not None
    # The file means the same to both: what it costs in one engine, it costs in the other.
    assert change["Q4_K_M"] == pytest.approx(theirs.llama / floats.llama - 1, abs=2 * NOISE)
