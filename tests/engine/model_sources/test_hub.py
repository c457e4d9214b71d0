"""Downloads from a stand-in for the hub that is slow, cuts, damages and refuses."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire.cli.commands import run
from quire.engine.checkpoint import find_model
from tests.stand_in_hub import MAIN, SECOND, Repository, StandInHub, find, serve, settings_of_the_hub

WEIGHTS = bytes(range(256)) * 64
READ = {"config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "model.safetensors"}
NOBODY = "http://127.0.0.1:9"
UNREAD = {
    *("pytorch_model.bin", "model.onnx", "consolidated.safetensors", "model.gguf", "x.pth", "README.md"),
    *("original/model.safetensors", "onnx/config.json"),
}


def content(commit: str, name: str) -> bytes:
    return WEIGHTS + f"{commit} {name}".encode()


def small(**faults: object) -> Repository:
    files = {commit: {name: content(commit, name) for name in READ | UNREAD} for commit in (MAIN, SECOND)}
    return Repository(files, **faults)  # type: ignore[arg-type]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StandInHub]:
    refused = {
        "org/gated": Repository({}, 403, "GatedRepo"),
        "org/private": Repository({}, 401, "RepoNotFound"),
        "org/forbidden": Repository({}, 403),
        "org/busy": Repository({}, 429),
        "org/down": Repository({}, 503),
    }
    with serve({"org/small": small(), **refused}) as hub, settings_of_the_hub(tmp_path, hub.endpoint):
        yield hub


def test_refusals_say_what_happened_and_what_to_do(hub: StandInHub) -> None:
    hub.repositories["org/half"] = small(file_status={"model.safetensors": 403}, code="GatedRepo")
    expected = {
        "org/gated": ("gated", "accept them on", "/org/gated", "hf auth login or set HF_TOKEN"),
        "org/half": ("gated", "/org/half"),
        "org/private": ("neither a folder here nor a model on the hub", "private model", "HF_TOKEN"),
        "org/none": ("neither a folder here nor a model on the hub", "check the name"),
        "org/forbidden": ("403", "lacks permission"),
        "org/busy": ("429", "wait some minutes"),
        "org/down": ("503", "try again later", "HF_ENDPOINT"),
        "org/small@v9": ("org/small has no revision v9", "branch, tag or commit"),
    }
    for name, parts in expected.items():
        said = find(name)
        assert said.startswith(name.partition("@")[0])
        assert "\n" not in said
        assert hub.endpoint in said, said
        assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("status", "parts"),
    [
        (401, ("401", "HF_TOKEN")),
        (403, ("403", "lacks permission")),
        (404, ("404", "check the name")),
        (429, ("429", "wait some minutes")),
        (503, ("503", "try again later")),
    ],
)
def test_a_file_that_is_refused(
    hub: StandInHub, status: int, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub lists the file, and then refuses to send it."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # it asks some times again
    hub.repositories["org/small"] = small(file_status={"model.safetensors": status})
    said = find("org/small")
    assert said.startswith("org/small")
    assert "\n" not in said
    assert all(part in said for part in parts), said
    hub.repositories["org/small"].file_status = {}
    assert Path(find("org/small"), "model.safetensors").read_bytes() == content(MAIN, "model.safetensors")


@pytest.mark.parametrize(
    "name",
    ["../../../../evil.json", "0_a/../../../../../../evil/config.json", "/tmp/evil.json", "0_a/../../config.json"],
)
def test_names_that_leave_the_folder_write_nothing(hub: StandInHub, name: str, tmp_path: Path) -> None:
    files = {each: content(MAIN, each) for each in READ} | {name: b"evil"}
    hub.repositories["org/small"] = Repository({MAIN: files})
    said = find("org/small")
    assert "\n" not in said
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"] == []
    assert not Path("/tmp/evil.json").exists()


def test_only_what_is_read_comes_from_one_commit(hub: StandInHub, tmp_path: Path) -> None:
    names = ["org/small", "org/small@v2", f"org/small@{SECOND}"]
    folders = [find(name) for name in names]
    assert [Path(folder).name for folder in folders] == [MAIN, SECOND, SECOND]
    for folder in map(Path, folders):
        assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == READ
        assert all(path.read_bytes() == content(folder.name, path.name) for path in folder.iterdir())
    # What is kept needs no hub.
    for offline in (True, False):
        with settings_of_the_hub(tmp_path, NOBODY, offline=offline):
            assert [find(name) for name in names] == folders


@pytest.mark.parametrize(
    ("proxy", "offline", "parts"),
    [
        ("", True, ("HF_HUB_OFFLINE forbids", "unset it", "quire pull org/small")),
        ("", False, (f"the hub cannot be reached at {NOBODY}", "HF_ENDPOINT", "HTTPS_PROXY")),
        (NOBODY, False, ("cannot be reached", "HTTPS_PROXY")),
    ],
)
def test_without_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str, offline: bool, parts: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with settings_of_the_hub(tmp_path, "http://hub.invalid" if proxy else NOBODY, offline=offline):
        said = find("org/small")
    assert said.startswith("org/small")
    assert all(part in said for part in parts), said


def test_a_proxy_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({}) as proxy, settings_of_the_hub(tmp_path, "https://hub.invalid"):
        monkeypatch.setenv("HTTPS_PROXY", proxy.endpoint)
        said = find("org/small")
    assert said.startswith("org/small: the proxy did not lead to https://hub.invalid")
    assert "HTTPS_PROXY" in said


def test_a_cut_transfer_goes_on_where_it_stopped(hub: StandInHub) -> None:
    hub.repositories["org/small"] = small(cut={"model.safetensors"}, pause=0.01)
    folder = find("org/small")
    assert Path(folder, "model.safetensors").read_bytes() == content(MAIN, "model.safetensors")
    half = len(content(MAIN, "model.safetensors")) // 2
    asked = [each for _, path, each in hub.requests if path.endswith("/model.safetensors")]
    (resumed,) = filter(None, asked)
    assert 0 < int(resumed.removeprefix("bytes=").partition("-")[0]) <= half


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_refused_and_fetched_again(hub: StandInHub, file: str) -> None:
    hub.repositories["org/small"].damaged = {file}
    said = find("org/small")
    assert said.startswith(f"org/small: {file} arrived damaged")
    before = hub.num_transfers()
    hub.repositories["org/small"].damaged = set()
    folder = find("org/small")
    assert Path(folder, file).read_bytes() == content(MAIN, file)
    assert hub.num_transfers() == before + 1


def test_pull_checks_what_was_kept(hub: StandInHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pull", "org/small"]) == 0
    shown = capsys.readouterr()
    assert MAIN in shown.out
    folder = Path(shown.out.splitlines()[-1])
    os.truncate((folder / "model.safetensors").resolve(), 9)
    assert run(["pull", "org/small"]) == 3
    assert "model.safetensors arrived damaged" in capsys.readouterr().err
    assert run(["pull", "org/small"]) == 0
    assert (folder / "model.safetensors").read_bytes() == content(MAIN, "model.safetensors")


def test_a_plan_downloads_no_weights(hub: StandInHub) -> None:
    folder = find_model("org/small", weights=False)
    assert {path.name for path in folder.iterdir()} == READ - {"model.safetensors"}
    # To serve it later fetches the rest.
    assert {path.name for path in Path(find("org/small")).iterdir()} == READ


def test_a_gguf_file_comes_alone_with_all_its_parts(hub: StandInHub) -> None:
    parts = {f"m-Q4_0-{number:05}-of-00002.gguf" for number in (1, 2)}
    listed = READ | parts | {"m-Q8_0.gguf"}
    hub.repositories["org/files"] = Repository({MAIN: {name: content(MAIN, name) for name in listed}})
    path = Path(find("org/files:m-Q4_0-00001-of-00002.gguf"))
    assert path.name == "m-Q4_0-00001-of-00002.gguf"
    assert {each.name for each in path.parent.iterdir()} == parts
    assert Path(find("org/files:m-Q8_0.gguf")).read_bytes() == content(MAIN, "m-Q8_0.gguf")
    said = find("org/files:m-Q2_K.gguf")
    assert said.startswith("org/files has no file m-Q2_K.gguf")
    assert hub.endpoint in said
