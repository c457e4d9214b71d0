"""Images over HTTP, through the clients that send them, with a model that reads them in its child process."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import ollama
import pytest
from openai import OpenAI

from quire import LLM, SamplingParams
from quire.config import EngineConfig
from quire.engine.async_engine import AsyncLLM
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine
from tests.vision_checkpoints import make_vision_checkpoint, random_image

OPTIONS: dict[str, Any] = {"num_blocks": 256, "max_num_seqs": 8, "threads": 1, "max_images": 3}
NUM_TOKENS = 12


def png(seed: int = 1) -> str:
    buffer = io.BytesIO()
    random_image(90, 50, seed).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def part(data: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def asked(*contents: Any, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": list(contents)}]
    return {"model": "m", "messages": messages, "temperature": 0, "max_tokens": NUM_TOKENS, **options}


TEXT = {"type": "text", "text": "What is it?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_checkpoint(tmp_path_factory.mktemp("smolvlm"), "smolvlm")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    config = EngineConfig(model=str(folder), served_model_name=("m",), disable_log_stats=True, spare=False, **OPTIONS)
    with RunningServer(AsyncLLM(config), start_seconds=120) as running:
        yield running


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    """The answer of `LLM`."""
    with LLM(str(folder), **OPTIONS) as llm:
        content = [{"type": "image", "image": random_image(90, 50, 1)}, TEXT]
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
        text: str = llm.chat([{"role": "user", "content": content}], params)[0].outputs[0].text
        return text


def test_clients_see_the_same_answer(server: RunningServer, expected: str) -> None:
    with server.client() as client:
        request = asked(part(png()), TEXT)
        assert client.chat.completions.create(**request).choices[0].message.content == expected
        again = client.chat.completions.create(**request)
        assert again.usage is not None
        assert again.usage.prompt_tokens_details is not None
        assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
        pieces = client.chat.completions.create(**request, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices) == expected
        check_responses(client, expected)
    check_anthropic(server, expected)
    check_ollama(server, expected)


def check_responses(client: OpenAI, expected: str) -> None:
    content = [{"type": "input_image", "image_url": f"data:image/png;base64,{png()}"}, {**TEXT, "type": "input_text"}]
    options: Any = {"input": [{"role": "user", "content": content}], "max_output_tokens": NUM_TOKENS}
    assert client.responses.create(model="m", temperature=0, **options).output_text == expected


def check_anthropic(server: RunningServer, expected: str) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png()}}
    messages: Any = [{"role": "user", "content": [image, TEXT]}]
    count = client.messages.count_tokens(model="m", messages=messages).input_tokens
    options: Any = {"extra_body": {"temperature": 0}}
    answer = client.messages.create(model="m", max_tokens=NUM_TOKENS, messages=messages, **options)
    assert answer.content[0].text == expected  # type: ignore[union-attr]
    assert count == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    client.close()


def check_ollama(server: RunningServer, expected: str) -> None:
    options = {"temperature": 0, "num_predict": NUM_TOKENS}
    message = {"role": "user", "content": TEXT["text"], "images": [png()]}
    with ollama.Client(server.url, timeout=20) as client:
        assert client.chat("m", [message], options=options).message.content == expected
        assert client.generate("m", TEXT["text"], images=[png()], options=options).response == expected


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ([part("aGVsbG8="), TEXT], "no image"),
        ([part(png()[:200]), TEXT], "broken or cut off|no image"),
        ([part("%%%"), TEXT], "base64"),
        ([part(png())] * 4, "4 images; at most 3"),
        ([part(png()), {"type": "text", "text": "<image>"}], "holds <image> 2 times and comes with 1 images"),
        ([{"type": "image_url"}, TEXT], r"messages\[0\].content\[0\] is an image without image_url"),
        ([{"type": "image_url", "image_url": {"url": 5}}], "data URL"),
        ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}], "allows no domain"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "neither a data URL nor http"),
        ([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}], "neither a data URL nor http"),
        ([{"type": "video_url", "video_url": {"url": "x"}}], "video_url"),
        ([{"type": "image", "marker": "x"}], "is an image without"),
    ],
)
def test_bad_images_are_the_clients_mistake(server: RunningServer, contents: list[Any], reason: str) -> None:
    response, body = server.send("POST", "/v1/chat/completions", asked(*contents))
    assert response.status == 400, body
    assert re.search(reason, body["error"]["message"]), body
    assert body["error"]["param"] == "messages"


def test_a_prompt_with_images_is_not_cut(server: RunningServer) -> None:
    for options in ({"truncate_prompt_tokens": 5}, {"truncate_prompt_tokens": 5, "truncation_side": "right"}):
        response, body = server.send("POST", "/v1/chat/completions", asked(part(png()), **options))
        assert response.status == 400
        assert "cannot be cut" in body["error"]["message"]


def test_a_model_of_text_refuses_images() -> None:
    with RunningServer(ScriptedEngine()) as server:
        message = {"role": "user", "content": [part(png()), TEXT]}
        for path, body in (
            ("/v1/chat/completions", {"model": "scripted", "messages": [message]}),
            ("/tokenize", {"model": "scripted", "messages": [message]}),
        ):
            response, answer = server.send("POST", path, body)
            assert response.status == 400
            assert "reads text only" in answer["error"]["message"]
