"""What `quire router` says, command by command, where it cannot start."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from quire.cli import main
from tests.router.fake_server import FakeServer
from tests.router.processes import free_port


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    """Name → URL of servers that run while the commands do."""
    kinds = {
        "plain": FakeServer(),
        "other": FakeServer(model="other"),
        "large": FakeServer(block_size=64),
        "locked": FakeServer(key="secret"),
        "empty": FakeServer(raw={"/v1/models": b'HTTP/1.1 200 X\r\ncontent-length: 11\r\n\r\n{"data":[]}'}),
        "mute": FakeServer(raw={"/v1/models": b"SSH-2.0-OpenSSH_9.6\r\n"}),
    }
    started, stopped, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

    async def run() -> None:
        async with AsyncExitStack() as stack:
            for server in kinds.values():
                await stack.enter_async_context(server.running())
            started.set()
            await stopped.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    assert started.wait(30)
    yield {name: server.url for name, server in kinds.items()}
    loop.call_soon_threadsafe(stopped.set)
    thread.join()
    loop.close()


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ("", ["backends is empty: give the URLs", "--backends http://a:8000,http://b:8000"]),
        ("--backends {nobody}", ["no backend answers ({nobody}: it does not answer", "start the servers first"]),
        ("--backends {mute}", ["no backend answers ({mute}: it does not answer"]),
        ("--backends {empty}", ["no backend answers ({empty}: its /v1/models lists no model"]),
        ("--backends {locked}", ["{locked}: it wants an API key", "--backend-api-key"]),
        ("--backends {plain},{other}", ["{other} serves other, but {plain} serves fake", "--served-model-name"]),
        ("--backends {plain},{large}", ["{large} has blocks of 64 tokens, but {plain} of 16", "--block-size"]),
        ("--backends {plain} --port {taken}", ["cannot listen on 127.0.0.1:{taken}: address already in use"]),
        ("--backends {plain} --host 0.0.0.0 --port 0", ["host is 0.0.0.0", "--allow-unauthenticated"]),
        ("--backends {plain} --kv-events tcp://a", ["kv_events has 'tcp://a'; write it as tcp://host:5557"]),
        ("--backends-file {folder}/none", ["{folder}/none"]),
        ("--backends-file {folder}/words", ["{folder}/words", "host:1"]),
        ("--backends-file {folder}/none --backends {plain}", ["backends and backends_file are both given"]),
        ("--backends {plain} --prefill {plain}", ["prefill has {plain}, which is also among those that answer"]),
        (
            "--backends {plain} --backend-ca-file {folder}/words",
            ["{folder}/words, which cannot be read as certificates"],
        ),
    ],
)
def test_a_router_that_cannot_start_says_why(
    arguments: str,
    messages: list[str],
    servers: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "words").write_text("host:1\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {
            **servers,
            "nobody": f"http://127.0.0.1:{free_port()}",
            "taken": str(taken.getsockname()[1]),
            "folder": str(tmp_path),
        }
        if "--port" not in arguments:
            arguments += " --port 0"
        with pytest.raises(SystemExit) as ended:
            main(["router", *arguments.format(**names).split()])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    for message in messages:
        assert message.format(**names) in said
    assert "Traceback" not in said
