"""Adapters as models: chosen by name on every endpoint, listed, loaded and unloaded while the server runs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.errors import ConfigError, RequestError
from quire.lora.registry import AdapterRegistry
from quire.server.key_use import check_keys
from quire.server.settings import ServerSettings
from tests.lora.test_adapter_folder import TENSORS, write
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "sql")


@pytest.fixture
def engine(folder: Path) -> ScriptedEngine:
    return ScriptedEngine(adapters=AdapterRegistry([f"sql={folder}"]))


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[RunningServer]:
    with RunningServer(engine, ServerSettings(port=0, allow_runtime_lora=True)) as running:
        yield running


ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["hi", "ho"], "max_tokens": 2},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 16},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 2},
    "/v1/embeddings": {"input": "hi"},
    "/api/chat": {"messages": MESSAGES, "stream": False},
    "/api/generate": {"prompt": "hi", "raw": True, "stream": False},
    "/api/embed": {"input": ["hi"]},
}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_endpoint_chooses_adapters_by_name(
    path: str, server: RunningServer, engine: ScriptedEngine, folder: Path
) -> None:
    names = ["sql", "scripted", "alias", *(["sql:latest"] if path.startswith("/api") else [])]
    for name in names:
        engine.calls.clear()
        response, body = server.send("POST", path, {"model": name, **ENDPOINTS[path]})
        assert response.status == 200, body
        assert engine.calls
        expected = engine.adapters.identify(str(folder)) if name.startswith("sql") else None
        assert {call.adapter for call in engine.calls} == {expected}
    response, body = server.send("POST", path, {"model": "nobody", **ENDPOINTS[path]})
    assert response.status == 404
    assert "sql" in str(body)


def test_models_lists_adapters_with_their_parent(server: RunningServer) -> None:
    _, body = server.send("GET", "/v1/models")
    cards = {card["id"]: (card["root"], card["parent"]) for card in body["data"]}
    assert cards == {"scripted": ("scripted", None), "alias": ("scripted", None), "sql": ("sql", "scripted")}
    assert server.send("GET", "/v1/models/sql")[1]["parent"] == "scripted"


def test_loading_and_unloading(server: RunningServer, engine: ScriptedEngine, tmp_path: Path) -> None:
    other = write(tmp_path / "other", {name: tensor * 3 for name, tensor in TENSORS.items()})
    ask = {"model": "new", "prompt": "hi"}
    assert server.send("POST", "/v1/completions", ask)[0].status == 404
    response, body = server.send("POST", LOAD, {"lora_name": "new", "lora_path": str(other)})
    assert (response.status, body) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert engine.calls[-1].adapter == engine.adapters.find("new"), "it is tried before it is served"
    assert server.send("POST", "/v1/completions", ask)[0].status == 200
    response, body = server.send("POST", LOAD, {"lora_name": "new", "lora_path": str(other)})
    assert response.status == 400
    assert "loaded already" in body["error"]["message"]
    write(other)
    response, _ = server.send("POST", LOAD, {"lora_name": "new", "lora_path": str(other), "load_inplace": True})
    assert response.status == 200
    assert engine.adapters.find("new").digest == engine.adapters.find("sql").digest
    response, body = server.send("POST", UNLOAD, {"lora_name": "new", "lora_int_id": 1})
    assert (response.status, body) == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert server.send("POST", "/v1/completions", ask)[0].status == 404
    assert server.send("POST", UNLOAD, {"lora_name": "new"})[0].status == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": "", "lora_path": "x"}, "lora_name"),
        ({"lora_name": "a\nb", "lora_path": "x"}, "lora_name"),
        ({"lora_name": "x" * 300, "lora_path": "x"}, "lora_name"),
        ({"lora_name": "scripted", "lora_path": "x"}, "lora_name"),
        ({"lora_name": "a", "lora_path": "/nowhere"}, "lora_path"),
        ({"lora_name": "a", "lora_path": "\x00"}, "lora_path"),
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_path": "x"}, "lora_name"),
        ({"lora_name": 1, "lora_path": "x"}, "lora_name"),
    ],
)
def test_bad_loads(body: dict[str, Any], param: str, server: RunningServer, engine: ScriptedEngine) -> None:
    response, answer = server.send("POST", LOAD, body)
    assert response.status == 400
    assert param in (answer["error"]["param"] or answer["error"]["message"])
    assert engine.adapters.names == ["sql"]


def test_an_adapter_that_does_not_fit_is_not_registered(
    server: RunningServer, engine: ScriptedEngine, folder: Path
) -> None:
    engine.raises = RequestError("it was trained for another base model", param="model", code="invalid_adapter")
    response, body = server.send("POST", LOAD, {"lora_name": "new", "lora_path": str(folder)})
    assert response.status == 400
    assert body["error"]["code"] == "invalid_adapter"
    assert engine.adapters.names == ["sql"]


def test_a_folder_that_was_removed_is_no_fault_of_the_server(
    server: RunningServer, engine: ScriptedEngine, folder: Path
) -> None:
    for file in folder.iterdir():
        file.unlink()
    response, body = server.send("POST", "/v1/completions", {"model": "sql", "prompt": "hi"})
    assert response.status == 400
    assert "the model 'sql' cannot be served" in body["error"]["message"]
    assert server.send("POST", "/v1/completions", {"model": "alias", "prompt": "hi"})[0].status == 200


def test_loading_needs_the_option(engine: ScriptedEngine, folder: Path) -> None:
    with RunningServer(engine, ServerSettings(port=0)) as server:
        for path, body in ((LOAD, {"lora_name": "a", "lora_path": str(folder)}), (UNLOAD, {"lora_name": "sql"})):
            response, answer = server.send("POST", path, body)
            assert response.status == 403
            assert "--allow-runtime-lora" in answer["error"]["message"]
    engine = ScriptedEngine(adapters=AdapterRegistry(enabled=False))
    with RunningServer(engine, ServerSettings(port=0, allow_runtime_lora=True)) as server:
        response, answer = server.send("POST", LOAD, {"lora_name": "a", "lora_path": str(folder)})
    assert response.status == 404
    assert "--enable-lora" in answer["error"]["message"]


@pytest.fixture
def keys(tmp_path: Path) -> Callable[..., ServerSettings]:
    def settings(models: str, **options: Any) -> ServerSettings:
        file = tmp_path / "keys.toml"
        file.write_text(
            '[[keys]]\nname = "app"\nkey = "a"\n'
            f"models = [{models}]\n"
            '[[keys]]\nname = "boss"\nkey = "b"\nadmin = true\n'
        )
        return ServerSettings(port=0, api_keys=str(file), **options)

    return settings


def test_keys_may_use_the_adapters_on_their_list(
    engine: ScriptedEngine, keys: Callable[..., ServerSettings], folder: Path
) -> None:
    app, boss = ({"authorization": f"Bearer {key}"} for key in "ab")
    with RunningServer(engine, keys('"sql"', allow_runtime_lora=True)) as server:
        assert [card["id"] for card in server.send("GET", "/v1/models", headers=app)[1]["data"]] == ["sql"]
        assert server.send("POST", "/v1/completions", {"prompt": "hi"}, app)[1]["model"] == "sql"
        assert engine.calls[-1].adapter is not None
        assert server.send("POST", "/v1/completions", {"prompt": "hi", "model": "alias"}, app)[0].status == 404
        body = {"lora_name": "new", "lora_path": str(folder)}
        assert server.send("POST", LOAD, body, app)[0].status == 403
        assert server.send("POST", LOAD, body, boss)[0].status == 200
        assert server.send("POST", "/v1/completions", {"prompt": "hi", "model": "new"}, app)[0].status == 404


def test_lists_of_keys_name_what_is_served(engine: ScriptedEngine, keys: Callable[..., ServerSettings]) -> None:
    check_keys(keys('"sql", "alias"'), engine)
    with pytest.raises(ConfigError, match="models holds 'later'; served: scripted, alias, sql"):
        check_keys(keys('"later"'), engine)
    check_keys(keys('"later"', allow_runtime_lora=True), engine)
