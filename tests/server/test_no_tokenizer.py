"""A model without a tokenizer: token ids go in and come out; what needs text is refused."""

import pytest
from openai import BadRequestError, OpenAI

from tests.server.scripted_engine import ScriptedEngine


def test_token_ids_are_served(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.tokenizer = None
    reply = client.completions.create(
        model="scripted", prompt=[5, 6, 7], max_tokens=4, extra_body={"return_token_ids": True}
    )
    assert engine.calls[0].prompt == [5, 6, 7]
    assert reply.choices[0].token_ids  # type: ignore[attr-defined]
    assert next(iter(client.models.list())).id == "scripted"


@pytest.mark.parametrize("options", [{"prompt": "a"}, {"prompt": [5], "echo": True}, {"prompt": [5], "logprobs": 1}])
def test_what_needs_text_is_refused(options: dict, client: OpenAI, engine: ScriptedEngine) -> None:
    engine.tokenizer = None
    with pytest.raises(BadRequestError, match="the model has no tokenizer"):
        client.completions.create(model="scripted", **options)
    with pytest.raises(BadRequestError, match="the model has no tokenizer"):
        client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "a"}])
