"""Options of `quire serve` from a file, from the environment and from flags."""

from pathlib import Path

import pytest

from quire.cli.commands import run

FILES = {
    "options.toml": (
        'model = "/m"\nmax-num-seqs = 5\nport = 9001\naccess_log = true\nallow-origins = ["http://a", "http://b"]\n'
    ),
    "options.yaml": "model: /m\nmax-num-seqs: 5\nport: 9001\naccess_log: true\nallow-origins: [http://a, http://b]\n",
}


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    assert run(["serve", "--show-config", *arguments]) == 0
    return dict(line.split(" = ", 1) for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("name", FILES)
def test_a_variable_overrides_the_file_and_a_flag_both(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_text(FILES[name])
    monkeypatch.setenv("QUIRE_MAX_NUM_SEQS", "6")
    monkeypatch.setenv("QUIRE_PORT", "9002")
    options = shown(capsys, "--config", str(path), "--port", "9003")
    assert options["model"] == f"/m  ({path})"
    assert options["access-log"] == f"True  ({path})"
    assert options["allow-origins"] == f"http://a, http://b  ({path})"
    assert options["max-num-seqs"] == "6  (env)"
    assert options["port"] == "9003  (flag)"
    assert options["block-size"] == "unset  (default)"
    monkeypatch.setenv("QUIRE_CONFIG", str(path))
    assert shown(capsys)["model"] == f"/m  ({path})"


def test_keys_are_not_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_API_KEY", "secret")
    assert shown(capsys)["api-key"] == "…  (env)"
    assert shown(capsys, "--api-key", "secret", "--api-key", "other")["api-key"] == "…, …  (flag)"


def test_the_port_of_a_kubernetes_service_is_no_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIRE_PORT", "tcp://10.0.0.1:8000")
    assert shown(capsys)["port"] == "8000  (default)"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "nonsense = 1", "nonsense"),
        ("a.toml", "port = [", "cannot be read"),
        ("a.yaml", "- port", "holds no table"),
        ("a.yaml", "a: [", "cannot be read"),
        ("a.toml", 'port = "many"', "port"),
        ("a.ini", "", ".toml, .yaml, .yml"),
        ("a.toml", None, "is no file"),
    ],
)
def test_a_wrong_file_is_named(
    name: str, content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert run(["serve", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert error.count("\n") == 1
