"""The small endpoints, the OpenAPI description, the metrics, and packages that the server must not import."""

import re
import subprocess
import sys
from typing import Any

from openai import OpenAI

from quire import __version__
from quire.outputs import EngineStats
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine, bundled_tokenizer


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["scripted", "alias"]
    card = client.models.retrieve("alias")
    assert card.model_extra is not None
    assert card.model_extra["root"] == "scripted"
    assert card.model_extra["max_model_len"] == 256
    assert card.model_extra["capabilities"] == ["completion", "embedding", "tools"]


def test_version_and_health(server: RunningServer) -> None:
    assert server.send("GET", "/version")[1] == {"version": __version__}
    assert server.send("GET", "/health")[1] == {"status": "ready"}


def test_tokenize_and_back(server: RunningServer) -> None:
    text = "Now is the winter — 🎭"
    _, reply = server.send("POST", "/tokenize", {"prompt": text, "return_token_strs": True})
    assert reply["tokens"] == bundled_tokenizer().encode(text)
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert reply["max_model_len"] == 256
    _, plain = server.send("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})
    assert server.send("POST", "/detokenize", {"tokens": plain["tokens"]})[1] == {"prompt": text}
    messages = [{"role": "user", "content": "Hi"}]
    _, chat = server.send("POST", "/tokenize", {"messages": messages})
    assert bundled_tokenizer().decode(chat["tokens"], skip_special_tokens=False).endswith("<|assistant|>")


def test_tokenize_refusals(server: RunningServer) -> None:
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": []}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [2**40]}),
        ("/detokenize", {"tokens": "x"}),
    ):
        response, reply = server.send("POST", path, body)
        assert response.status == 400, body
        assert reply["error"]["message"]


def test_openapi_describes_every_route(server: RunningServer) -> None:
    _, spec = server.send("GET", "/openapi.json")
    assert spec["openapi"].startswith("3.1")
    assert {"/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions", "/health"} <= set(
        spec["paths"]
    )
    references = set(re.findall(r"#/components/schemas/(\w+)", str(spec)))
    assert references <= set(spec["components"]["schemas"])
    assert spec["paths"]["/health"]["get"]["security"] == []
    assert "security" not in spec, "this server has no keys"
    ids = [operation["operationId"] for path in spec["paths"].values() for operation in path.values()]
    assert len(set(ids)) == len(ids)
    schemas = spec["components"]["schemas"]
    assert {"type": "number", "minimum": 0.0, "maximum": 1e6} in (
        schemas["ChatCompletionRequest"]["properties"]["temperature"]["anyOf"]
    )
    assert schemas["ChatCompletionRequest"]["properties"]["messages"]["minItems"] == 1
    assert list(spec["paths"]["/api/chat"]["post"]["responses"]["200"]["content"])[1] == "application/x-ndjson"
    failure = spec["paths"]["/v1/messages"]["post"]["responses"]["default"]["content"]["application/json"]
    assert failure["schema"]["$ref"].endswith("/AnthropicError")
    assert "temperature" in spec["components"]["schemas"]["ChatCompletionRequest"]["properties"]


def test_the_root_answers_any_client(engine: ScriptedEngine) -> None:
    with RunningServer(engine, ServerSettings(port=0, api_key=("secret",))) as server:
        assert "Quire is running" in server.send("GET", "/")[1]
        assert server.send("HEAD", "/")[0].status == 200


def test_docs_page_loads_nothing(server: RunningServer) -> None:
    response, page = server.send("GET", "/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "/v1/chat/completions" in page
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_metrics(server: RunningServer, client: OpenAI, engine: ScriptedEngine) -> None:
    client.completions.create(model="scripted", prompt="x", max_tokens=4, n=2)
    engine.metrics.record_stats(EngineStats(num_running=3, num_blocks=64, block_size=16, total_steps=9))
    response, text = server.send("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    labels = 'engine="0",model_name="scripted"'
    engine.metrics.record_stats(
        EngineStats(
            num_running=3, num_blocks=64, block_size=16, total_steps=9, total_prompt_tokens=30, total_prefix_hits=12
        )
    )
    assert f"vllm:prompt_tokens_total{{{labels}}} 42.0" in server.send("GET", "/metrics")[1]
    for prefix in ("quire", "vllm"):
        assert f"{prefix}:num_requests_running{{{labels}}} 3.0" in text
        assert (
            f'{prefix}:request_success_total{{engine="0",finished_reason="length",model_name="scripted"}} 2.0' in text
        )
        assert f"{prefix}:time_to_first_token_seconds_count{{{labels}}} 1.0" in text
        assert f"{prefix}:request_generation_tokens_sum{{{labels}}} 8.0" in text
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="200"} 1.0' in text


def test_unknown_paths_do_not_add_metrics(server: RunningServer) -> None:
    for number in range(5):
        server.send("GET", f"/made/up/{number}")
    _, text = server.send("GET", "/metrics")
    assert 'handler="none",method="GET",status="404"} 5.0' in text
    assert "/made" not in text


def test_server_and_cli_import_no_heavy_package() -> None:
    code = (
        "import sys, quire.server.listen, quire.cli.commands, quire.cli.serve, quire.cli.chat, quire.cli.bench_serve\n"
        "unwanted = {'torch', 'numpy', 'transformers', 'pydantic', 'httpx', 'openai', 'opentelemetry'}\n"
        "print(sorted(unwanted & set(sys.modules)))"
    )
    environment: dict[str, Any] = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_chat_is_rendered_and_the_tokenizer_described(server: RunningServer, engine: ScriptedEngine) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    _, rendered = server.send("POST", "/v1/chat/completions/render", body)
    assert engine.calls == []
    server.send("POST", "/v1/chat/completions", body)
    assert rendered["token_ids"] == engine.calls[0].prompt
    assert rendered["prompt"].startswith("<|begin|>")
    assert rendered["count"] == len(engine.calls[0].prompt)
    _, info = server.send("GET", "/tokenizer_info")
    assert info["special_tokens"]["bos_token"] == "<|begin|>"
    assert info["added_tokens_decoder"]["0"] == {"content": "<|begin|>", "special": True}
    assert "messages" in info["chat_template"]
