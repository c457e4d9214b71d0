"""Programs of real clients: all of clients.toml with QUIRE_TEST_CLIENTS=FOLDER, the light ones without."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from tests.clients.environments import ROOT, RealClient, make_environment, read_clients
from tests.clients.running import Results, run_program, running

FOLDER = os.environ.get("QUIRE_TEST_CLIENTS")
CLIENTS = {name: client for name, client in read_clients().items() if FOLDER or client.light}


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[str], str]]:
    """From a kind of server to its URL. Each is started once, when it is first asked for."""
    with ExitStack() as stack:
        yield cache(lambda kind: stack.enter_context(running(kind)))


def environment(client: RealClient) -> Path | None:
    """The folder of the client's environment; None: this one. Skips where a light client cannot be had."""
    if FOLDER:
        folder = Path(FOLDER).absolute() / client.name
        make_environment(client, folder)
        return folder
    if client.packages:
        return None
    if shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = ROOT / ".venv-clients" / client.name
    try:
        make_environment(client, folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"npm cannot install {client.pins}: {error.stderr[:200]}")
    return folder


@cache
def results(name: str, url: str) -> Results:
    return run_program(CLIENTS[name], url, environment(CLIENTS[name]))


@pytest.mark.parametrize(("name", "feature"), [(name, shown) for name in CLIENTS for shown in CLIENTS[name].shows])
def test_the_program_shows(servers: Callable[[str], str], name: str, feature: str) -> None:
    error = results(name, servers(CLIENTS[name].server))[feature]
    assert error is None, error


@pytest.mark.parametrize("name", CLIENTS)
def test_the_program_shows_what_the_table_says(servers: Callable[[str], str], name: str) -> None:
    assert set(results(name, servers(CLIENTS[name].server))) == set(CLIENTS[name].shows)
