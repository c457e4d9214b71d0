"""A stand-in for the Hugging Face hub: an HTTP server whose repositories fail on demand. Only tests use it."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from quire.engine.checkpoint import find_model
from quire.errors import CheckpointError

MAIN, SECOND = "a" * 40, "b" * 40
BRANCHES = {"main": MAIN, "v2": SECOND}


@dataclass
class Repository:
    """A model's files by commit, and what goes wrong with it."""

    files: dict[str, dict[str, bytes]]
    status: int = 200
    """Answer of the API."""
    code: str = ""
    """The hub's header X-Error-Code."""
    file_status: dict[str, int] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    """Files whose next transfer ends half way."""
    damaged: set[str] = field(default_factory=set)
    """Files whose content arrives with one byte changed."""
    pause: float = 0.0
    """Seconds between pieces of a file."""


def answer(status: int, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, body


def checksum(name: str, content: bytes) -> str:
    """The hub's: SHA-256 of large files, git's SHA-1 of the others."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree_entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": checksum(name, content)[:40]}
    if name.endswith(".safetensors"):
        entry["lfs"] = {"oid": checksum(name, content), "size": len(content), "pointerSize": 134}
    return entry


class StandInHub:
    """Repositories by name, the requests so far as (method, path, Range), and the address."""

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories = repositories
        self.requests: list[tuple[str, str, str]] = []
        self.endpoint = ""

    def num_transfers(self) -> int:
        return sum(method == "GET" and "/resolve/" in path for method, path, _ in self.requests)

    def respond(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = path.split("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if is_api else parts
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None:
            return answer(404, X_Error_Code="RepoNotFound")
        if is_api and repository.status != 200:
            return answer(repository.status, X_Error_Code=repository.code, X_Error_Message="stand-in says no")
        revision = rest[1] if len(rest) > 1 else "main"
        commit = BRANCHES.get(revision, revision)
        if commit not in repository.files:
            return answer(404, X_Error_Code="RevisionNotFound")
        files = repository.files[commit]
        if is_api and rest[:1] == ["tree"]:
            return answer(200, json.dumps([tree_entry(*each) for each in files.items()]).encode())
        if is_api:
            siblings = [{"rfilename": each} for each in files]
            return answer(200, json.dumps({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}).encode())
        return self.file(repository, commit, "/".join(rest[2:]))

    def file(self, repository: Repository, commit: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if name in repository.file_status:
            return answer(repository.file_status[name], X_Error_Code=repository.code)
        content = repository.files[commit][name]
        etag = checksum(name, content)
        if name in repository.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(with_body=True)

            def do_HEAD(self) -> None:
                self.reply(with_body=False)

            def reply(self, *, with_body: bool) -> None:
                asked = self.headers.get("Range", "")
                hub.requests.append((self.command, self.path, asked))
                status, headers, body = hub.respond(self.path)
                if status == 200 and asked:
                    first = int(asked.removeprefix("bytes=").partition("-")[0])
                    headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
                    status, body = 206, body[first:]
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.send(body)

            def send(self, body: bytes) -> None:
                parts = self.path.split("/")
                repository = hub.repositories.get("/".join(parts[1:3]))
                if repository is None:
                    self.wfile.write(body)
                    return
                if parts[-1] in repository.cut:
                    repository.cut.remove(parts[-1])
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return
                step = max(1, len(body) // 4)
                for start in range(0, len(body), step):
                    time.sleep(repository.pause)
                    self.wfile.write(body[start : start + step])

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[StandInHub]:
    hub = StandInHub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub.handler())
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def settings_of_the_hub(home: Path, endpoint: str, *, offline: bool = False) -> Iterator[None]:
    """The hub's library in this process with these settings. It read its own when it was imported."""
    from huggingface_hub import close_session, constants

    changed = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,
        "DOWNLOAD_CHUNK_SIZE": 1024,  # bytes of a piece that is kept when the next one is cut off
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setattr(constants, name, value)
        close_session()
        yield
        close_session()


def find(name: str) -> str:
    """The folder that `find_model` returns, or the error's text."""
    try:
        return str(find_model(name))
    except CheckpointError as error:
        return str(error)
