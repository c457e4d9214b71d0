"""Finding a model's files: the bundled model, a folder, and a hub model from a local stand-in for the hub."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quire.config import EngineConfig
from quire.engine.checkpoint import bundled_folder, find_model, model_name, read_default_params
from quire.errors import CheckpointError

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


def content(file: str, commit: str) -> str:
    return json.dumps({"file": file, "commit": commit})


class Hub(BaseHTTPRequestHandler):
    """Has one model, org/small, at two commits; its files contain their name and commit."""

    files = ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin")
    requests: list[str] = []  # noqa: RUF012  # shared by all handlers on purpose

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, *, with_body: bool) -> None:
        self.requests.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        headers: dict[str, str] = {}
        if parts[:5] == ["api", "models", "org", "small", "tree"]:
            commit = COMMITS.get(parts[5], parts[5])
            body = json.dumps(
                [
                    {"type": "file", "path": f, "size": len(content(f, commit)), "oid": commit[:8] + f}
                    for f in self.files
                ]
            )
        elif parts[:4] == ["api", "models", "org", "small"]:
            revision = parts[5] if len(parts) > 5 else "main"
            commit = COMMITS.get(revision, revision)
            body = json.dumps({"id": "org/small", "sha": commit, "siblings": [{"rfilename": f} for f in self.files]})
        elif parts[:3] == ["org", "small", "resolve"]:
            commit = COMMITS.get(parts[3], parts[3])
            body = content(parts[4], commit)
            headers = {"ETag": f'"{commit[:8]}{parts[4]}"', "X-Repo-Commit": commit}
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = body.encode()
        self.send_response(200)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def find_in_a_new_process(cache: Path, endpoint: str, model: str, revision: str | None = None) -> str:
    """The hub's library reads its settings when it is imported. Returns the folder, or the error's text."""
    code = (
        "import sys\n"
        "from quire.engine.checkpoint import find_model\n"
        "from quire.errors import CheckpointError\n"
        "try:\n"
        f"    print(find_model({model!r}, {revision!r}))\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_hub_model_is_fetched_once_from_one_commit(hub: str, tmp_path: Path) -> None:
    folder = Path(find_in_a_new_process(tmp_path, hub, "org/small"))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]  # no pickles
    assert {json.loads((folder / name).read_text())["commit"] for name in names} == {COMMITS["main"]}
    fetched = len([path for path in Hub.requests if "/resolve/" in path])
    assert find_in_a_new_process(tmp_path, hub, "org/small") == str(folder)
    assert len([path for path in Hub.requests if "/resolve/" in path]) == fetched
    other = Path(find_in_a_new_process(tmp_path, hub, "org/small", "v2"))
    assert {json.loads((other / name).read_text())["commit"] for name in names} == {COMMITS["v2"]}


def test_without_a_connection_an_earlier_download_serves(hub: str, tmp_path: Path) -> None:
    folder = find_in_a_new_process(tmp_path, hub, "org/small")
    assert find_in_a_new_process(tmp_path, "http://127.0.0.1:9", "org/small") == folder
    assert "the hub cannot be reached" in find_in_a_new_process(tmp_path, "http://127.0.0.1:9", "org/other")


def test_an_unknown_name_says_so(hub: str, tmp_path: Path) -> None:
    said = find_in_a_new_process(tmp_path, hub, "org/none")
    assert said.startswith("org/none is neither a folder here nor a model on the hub")


def test_folders(tmp_path: Path) -> None:
    assert find_model("") == bundled_folder()
    assert (bundled_folder() / "model.safetensors").is_file()
    assert find_model(str(tmp_path)) == tmp_path
    file = tmp_path / "model.bin"
    file.touch()
    for wrong in (str(file), str(tmp_path / "nothing"), "./nothing", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"is n.* a folder.*; give the folder of a checkpoint"):
            find_model(wrong)


def test_gguf_files(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert find_model(str(file)) == file
    assert find_model(str(tmp_path)) == file
    assert model_name(str(file)) == "model.gguf"
    (tmp_path / "other.gguf").touch()
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models: model.gguf, other.gguf; give the path of one"):
        find_model(str(tmp_path))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    assert find_model(str(tmp_path)) == tmp_path


def test_defaults_of_generation_config(tmp_path: Path) -> None:
    assert read_default_params(EngineConfig(), tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 20, "top_p": null, "max_new_tokens": 5, "do_sample": true, "eos_token_id": 2}'
    )
    assert read_default_params(EngineConfig(), tmp_path) == {"temperature": 0.6, "top_k": 20, "max_tokens": 5}
    assert read_default_params(EngineConfig(generation_config="none"), tmp_path) == {}
    (tmp_path / "generation_config.json").write_text('{"do_sample": false}')
    assert read_default_params(EngineConfig(), tmp_path) == {"temperature": 0.0}


def test_the_name_of_a_folder_hides_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "small"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (str(folder), f"{folder}/", "org/small", "./org/small", "org/../org/small", "~/org/small"):
        assert model_name(given) == "small", given
    monkeypatch.chdir(folder)
    assert (model_name("."), model_name("..")) == ("small", "org")
    assert model_name("org/on-the-hub") == "org/on-the-hub"
    assert model_name("") == "quire-bundled"


def test_a_short_name_has_the_sampling_of_its_card(tmp_path: Path) -> None:
    assert read_default_params(EngineConfig(model="smollm2"), tmp_path) == {"temperature": 0.2, "top_p": 0.9}
    assert read_default_params(EngineConfig(model="smollm2", generation_config="none"), tmp_path) == {}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    assert read_default_params(EngineConfig(model="smollm2"), tmp_path) == {"temperature": 0.5, "top_p": 0.9}
