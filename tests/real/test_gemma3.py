"""Gemma 3 270M straight from a Q4_K_M file: tokens and perplexity are those of its weights in floats."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.convert.run import convert_model
from quire.convert.target import Target
from tests.real.real_models import gemma, near_ties

pytestmark = pytest.mark.skipif("QUIRE_TEST_REAL" not in os.environ, reason="make test-real downloads real models")

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time there was a king who",
    "Der schnelle braune Fuchs",
)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a folder in the hub's form, which transformers reads."""
    return convert_model(gemma(), Target.parse("fp32"), tmp_path_factory.mktemp("gemma") / "fp32").path


@pytest.fixture(scope="module")
def model() -> Iterator[LLM]:
    with LLM(str(gemma()), max_model_len=1024, max_num_seqs=8) as llm:
        yield llm


def test_tokens_are_those_of_the_weights_in_floats(model: LLM, floats: Path) -> None:
    """The file has four types of blocks; their rows have inputs of 8 and 15 bits."""
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    outputs = model.generate(list(PROMPTS), params, use_tqdm=False)
    rows = [(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]
    assert near_ties(floats, rows) <= 2
    assert "France" in outputs[0].outputs[0].text


def test_a_window_of_positions_passes(model: LLM, floats: Path) -> None:
    """A prompt that is longer than the window of 512 tokens."""
    prompt = model.get_tokenizer().encode("The quick brown fox jumps over the lazy dog. " * 60)
    assert len(prompt) > 560
    (output,) = model.generate(
        {"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False
    )
    assert near_ties(floats, [(prompt, list(output.outputs[0].token_ids))]) <= 1
