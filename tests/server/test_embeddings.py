"""/v1/embeddings through the openai client."""

import math
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine, bundled_tokenizer


def test_texts_and_tokens(client: OpenAI, engine: ScriptedEngine) -> None:
    for given, num_vectors in (("To be", 1), (["To be", "or not"], 2), ([5, 6, 7], 1), ([[5], [6, 7]], 2)):
        reply = client.embeddings.create(model="scripted", input=given)  # type: ignore[arg-type]  # a union of lists
        assert [item.index for item in reply.data] == list(range(num_vectors))
        assert all(math.hypot(*item.embedding) == pytest.approx(1) for item in reply.data)
        calls = engine.calls[-num_vectors:]
        assert reply.usage.prompt_tokens == sum(len(call.prompt) for call in calls)
        ratios = [item.embedding[0] / item.embedding[1] * 3 for item in reply.data]
        assert ratios == pytest.approx([len(call.prompt) for call in calls])
    assert engine.calls[0].prompt == bundled_tokenizer().encode("To be")


def test_forms(server: RunningServer, client: OpenAI) -> None:
    """The client asks for base64 unless told otherwise, and decodes it."""
    asked: Any = {"model": "scripted", "input": [5, 6, 7]}
    plain = client.embeddings.create(**asked, encoding_format="float").data[0].embedding
    assert client.embeddings.create(**asked).data[0].embedding == pytest.approx(plain)
    short = client.embeddings.create(**asked, dimensions=2).data[0].embedding
    assert short == pytest.approx([3 / math.hypot(3, 3)] * 2)
    _, raw = server.send("POST", "/v1/embeddings", {"input": [5, 6, 7], "normalize": False})
    assert raw["data"][0]["embedding"] == [3, 3, 4, 0]
    _, cut = server.send(
        "POST", "/v1/embeddings", {"input": [5] * 999, "normalize": False, "truncate_prompt_tokens": 7}
    )
    assert cut["data"][0]["embedding"][0] == 7


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"dimensions": 2**20}, "dimensions"),
        ({"input": ["a", 1]}, "input"),
        ({"input": "word " * 1000}, "input"),
        ({"input": ["x"] * 3000}, "input"),
        ({"dimensions": 5}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_refuses_by_name(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.embeddings.create(model="scripted", input="x", extra_body=fields)
    assert refused.value.param == param
