"""A server with a scripted engine, and an OpenAI client for it."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[RunningServer]:
    with RunningServer(engine) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client
