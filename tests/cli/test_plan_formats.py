"""`quire plan` on models as people have them: folders of few bits, GGUF files, packed folders, names of the hub."""

import json
from pathlib import Path
from typing import Any

import pytest

from quire.cli.commands import run
from quire.convert.run import convert_model
from quire.convert.target import Target
from quire.engine.checkpoint import find_model
from tests.checkpoints import make_checkpoint
from tests.gguf_files import write_gguf
from tests.models.stored.packers import CASES, pack_checkpoint
from tests.stand_in_hub import MAIN, Repository, serve, settings_of_the_hub

BITS = {
    "gptq 4": 4,
    "gptq 8 asymmetric": 8,
    "awq gemm": 4,
    "W4A16": 4,
    "W8A8": 8,
    "FP8 block": 8,
    "MXFP4": 4,
    "fp8 of DeepSeek": 8,
    "bnb nf4": 4,
    "torchao int8": 8,
    "mlx 8": 8,
}
"""Format of a folder → bits of its codes."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers take most of its memory."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 260, "num_hidden_layers": 3}
    return make_checkpoint(tmp_path_factory.mktemp("plan") / "source", "llama", **sizes)


def planned(capsys: pytest.CaptureFixture[str], model: Path | str, *options: str) -> dict[str, Any]:
    assert run(["plan", str(model), "--json", "--no-compare", "--num-blocks", "32", *options]) == 0
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert figures["served"]
    assert figures["users_that_fit"] > 0
    return figures


@pytest.mark.parametrize("name", BITS)
def test_a_folder_of_few_bits(name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its plan counts its codes, and so does the plan of its config.json alone."""
    dense = planned(capsys, source)["weights"]
    folder = pack_checkpoint(source, tmp_path, CASES[name])
    whole = planned(capsys, folder)["weights"]
    assert BITS[name] / 32 < whole / dense < 2 * BITS[name] / 32 + 0.1
    (folder / "model.safetensors").unlink()
    for alone in (folder, folder / "config.json"):
        assert planned(capsys, alone)["weights"] == pytest.approx(whole, rel=0.15)
    assert run(["plan", str(folder), "--no-compare"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(("block", "bits"), [("F16", 16), ("Q8_0", 8), ("Q4_0", 4)])
def test_a_gguf_file(block: str, bits: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = planned(capsys, source)["weights"]
    path = write_gguf(source, tmp_path / "model.gguf", "llama", block)
    figures = planned(capsys, path)
    assert bits / 32 <= figures["weights"] / dense < 2 * bits / 32 + 0.1
    assert planned(capsys, tmp_path)["weights"] == figures["weights"], "the folder of the file"


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_a_packed_folder(to: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = convert_model(source, Target.parse(to), tmp_path / "made").path
    figures = planned(capsys, made)
    assert figures["weights"] == planned(capsys, source, "--quantization", to)["weights"]


def test_a_name_of_the_hub_with_and_without_a_connection(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    repositories = {"org/m": Repository({MAIN: files})}
    with serve(repositories) as hub, settings_of_the_hub(tmp_path, hub.endpoint):
        weights = planned(capsys, "org/m")["weights"]
        assert not [*find_model("org/m", weights=False).glob("*.safetensors")]
    with settings_of_the_hub(tmp_path, "http://127.0.0.1:1"):
        assert planned(capsys, "org/m")["weights"] == weights
        assert run(["plan", "org/other"]) == 3
        assert "the hub cannot be reached at http://127.0.0.1:1" in capsys.readouterr().err
    with settings_of_the_hub(tmp_path, "http://127.0.0.1:1", offline=True):
        assert planned(capsys, "org/m")["weights"] == weights
