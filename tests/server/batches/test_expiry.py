"""Files that are deleted at the time their client chose."""

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import openai
import pytest

from quire.server.app import ENDPOINTS
from quire.server.auth import Client
from quire.server.batches.expiry import read_expires_after
from quire.server.batches.objects import CreateBatch, ExpiresAfter, FileObject
from quire.server.batches.service import BatchService
from quire.server.batches.store import BatchStore
from quire.server.errors import Refusal
from quire.server.key_use import KeyRing
from quire.server.settings import ServerSettings
from tests.server.batches.test_batches import URL, request_line, settings_for, submit, wait_for
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

HOUR, MONTH = 3600, 2592000
CLIENT = Client("account", "salt")


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def service_in(folder: Path, clock: Clock, engine: ScriptedEngine | None = None) -> BatchService:
    settings = ServerSettings(batch_dir=str(folder))
    store = BatchStore(folder)
    return BatchService(store, engine or ScriptedEngine(), settings, ENDPOINTS, KeyRing(settings), clock)


async def add(service: BatchService, name: str, expires_at: int | None, content: bytes = b"{}") -> None:
    partial = service.path_of(f"{name}.partial")
    partial.write_bytes(content)
    file = FileObject(
        id=name, bytes=len(content), created_at=0, expires_at=expires_at, filename="a.jsonl", purpose="batch"
    )
    await service.add_file(file, CLIENT, partial)


async def names(service: BatchService) -> list[str]:
    page = await service.files(CLIENT, purpose=None, after=None, limit=1000, ascending=True)
    return [file.id for file in page.data]


async def settled(service: BatchService, *gone: str) -> None:
    """Wait until the content of these files is deleted."""
    async with asyncio.timeout(5):
        while any(service.path_of(name).exists() for name in gone):
            await asyncio.sleep(0.005)


def test_files_vanish_at_their_time(tmp_path: Path) -> None:
    async def run() -> None:
        clock = Clock()
        service = service_in(tmp_path, clock)
        await service.start()
        await add(service, "file-later", int(clock.now) + 2 * HOUR)
        await add(service, "file-soon", int(clock.now) + HOUR)
        await add(service, "file-never", None)
        clock.now += HOUR
        assert await names(service) == ["file-later", "file-never"]  # at that second, before the content is deleted
        with pytest.raises(Refusal, match="there is no file"):
            await service.file("file-soon", CLIENT)
        await add(service, "file-more", None)  # wakes the sweeper, whose own clock has not come that far
        await settled(service, "file-soon")
        async with asyncio.timeout(5):
            while await service.room() != ServerSettings().batch_dir_size - 3 * len("{}"):
                await asyncio.sleep(0.005)
        assert service.path_of("file-later").exists()
        await service.stop()
        # What went over while the server was down is deleted at the next start, more than one portion of it.
        clock.now += HOUR
        again = service_in(tmp_path, clock)
        for index in range(300):
            await add(again, f"file-{index}", int(clock.now) - index)
        await again.start()
        await settled(again, "file-later", *(f"file-{index}" for index in range(300)))
        assert await names(again) == ["file-never", "file-more"]
        await again.stop()

    asyncio.run(run())


def test_a_batch_keeps_its_input_until_it_is_over(tmp_path: Path) -> None:
    async def run() -> None:
        clock, engine = Clock(), ScriptedEngine()
        await engine.start()
        await engine.wait_ready()
        engine.delay = 0.3
        service = service_in(tmp_path, clock, engine)
        await service.start()
        await add(service, "file-input", int(clock.now) + HOUR, json.dumps(request_line("a", max_tokens=1)).encode())
        after = ExpiresAfter(anchor="created_at", seconds=HOUR)
        body = CreateBatch(
            input_file_id="file-input", endpoint=URL, completion_window="24h", output_expires_after=after
        )
        batch = await service.create(body, CLIENT)
        clock.now += HOUR
        await add(service, "file-other", None)
        await asyncio.sleep(0.05)
        assert "file-input" not in await names(service)
        assert service.path_of("file-input").exists()
        async with asyncio.timeout(5):
            await service.wait(batch.id)
        batch = await service.batch(batch.id, CLIENT)
        assert (batch.status, batch.output_expires_after) == ("completed", after)
        await settled(service, "file-input")
        output = await service.file(str(batch.output_file_id), CLIENT)
        assert output.expires_at == int(clock.now) + HOUR
        clock.now += HOUR
        await add(service, "file-last", None)
        await settled(service, output.id)
        await service.stop()

    asyncio.run(run())


def test_clients_choose_the_time(tmp_path: Path) -> None:
    with RunningServer(ScriptedEngine(), settings_for(tmp_path)) as server, server.client() as client:
        after: Any = {"anchor": "created_at", "seconds": MONTH}
        file = client.files.create(file=("a.jsonl", b"{}"), purpose="batch", expires_after=after)
        assert file.expires_at == file.created_at + MONTH
        assert client.files.retrieve(file.id) == file
        batch = wait_for(client, submit(client, [request_line("a")], output_expires_after=after).id)
        output = client.files.retrieve(batch.output_file_id)
        assert output.expires_at == output.created_at + MONTH
        with pytest.raises(openai.BadRequestError, match="expires_after") as error:
            client.files.create(file=("a", b"{}"), purpose="batch", expires_after={**after, "seconds": 60})
        assert error.value.param == "expires_after"
        with pytest.raises(openai.BadRequestError, match="output_expires_after"):
            submit(client, [request_line("a")], output_expires_after={**after, "seconds": 60})


@pytest.mark.parametrize(
    ("form", "seconds"),
    [
        ({}, None),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}, HOUR),
        ({"expires_after": '{"anchor": "created_at", "seconds": 2592000}'}, MONTH),
        ({"expires_after[seconds]": "3600"}, "anchor"),
        ({"expires_after[anchor]": "created_at"}, "seconds"),
        ({"expires_after[anchor]": "last_active_at", "expires_after[seconds]": "3600"}, "last_active_at"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}, "3600"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592001"}, "2592000"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "soon"}, "int"),
        ({"expires_after": "{"}, "cannot be read"),
        ({"expires_after": "[]"}, "object"),
    ],
)
def test_the_field_of_a_form(form: dict[str, str], seconds: int | str | None) -> None:
    if isinstance(seconds, str):
        with pytest.raises(Refusal, match=seconds) as refusal:
            read_expires_after(form)
        assert (refusal.value.status, refusal.value.param) == (400, "expires_after")
    else:
        found = read_expires_after(form)
        assert (found.seconds if found else None) == seconds


def test_an_older_store_is_taken_over(tmp_path: Path) -> None:
    BatchStore(tmp_path).close()
    db = sqlite3.connect(tmp_path / "batches.sqlite3")
    db.execute("DROP INDEX expiries")
    db.execute("ALTER TABLE files DROP COLUMN expires_at")
    db.commit()
    db.close()
    store = BatchStore(tmp_path)
    assert store.delete_expired(1e12, frozenset()) is None
    store.close()
