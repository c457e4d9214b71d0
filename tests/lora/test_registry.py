"""Names of adapters, and digests that follow the files."""

from pathlib import Path

import pytest

from quire.errors import CheckpointError, ConfigError, RequestError
from quire.lora.registry import AdapterRegistry, parse_module
from quire.lora.request import LoRARequest
from tests.lora.test_adapter_folder import TENSORS, write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sql=adapters/sql", ("sql", "adapters/sql")),
        ("a b = /x=y", ("a b", " /x=y")),
        ('{"name": "sql", "path": "/x", "base_model_name": "m"}', ("sql", "/x")),
    ],
)
def test_modules(text: str, expected: tuple[str, str]) -> None:
    assert parse_module(text) == expected


@pytest.mark.parametrize(
    "text", ["", "sql", "=x", "sql=", "{", "{}", '{"name": 1, "path": "x"}', '{"name": "a"}', "[]"]
)
def test_bad_modules(text: str) -> None:
    with pytest.raises(ConfigError, match="lora_modules is"):
        parse_module(text)


def test_a_name_is_given_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    with pytest.raises(ConfigError, match="names 'x' twice"):
        AdapterRegistry([f"x={folder}", f"x={folder}"])


def test_digests_follow_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    registry = AdapterRegistry([f"x={folder}"])
    assert registry.names == ["x"]
    assert registry.known("x") is None
    first = registry.find("x")
    assert registry.known("x") == first == registry.find("x")
    write(folder, {name: tensor * 2 for name, tensor in TENSORS.items()})
    assert registry.known("x") is None
    second = registry.find("x")
    assert second.digest != first.digest
    registry.add("x", str(write(tmp_path / "b")))
    assert registry.find("x").digest == first.digest, "the content decides, not the place"
    registry.remove("x")
    with pytest.raises(CheckpointError, match="no adapter named 'x' is loaded any more"):
        registry.find("x")


def test_a_folder_that_vanishes_is_an_error_of_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    registry = AdapterRegistry([f"x={folder}"])
    registry.find("x")
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        registry.find("x")


@pytest.mark.parametrize(
    "given", [("", 1, "p"), ("n", 0, "p"), ("n", True, "p"), ("n", 1, ""), (1, 1, "p"), ("n", 1, None)]
)
def test_lora_requests_are_checked(given: tuple[object, object, object]) -> None:
    with pytest.raises(RequestError):
        LoRARequest(*given)  # type: ignore[arg-type]
