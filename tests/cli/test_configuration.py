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
        ("a.yaml", "max-num-sqs: 5", "has 'max-num-sqs', which is no option; did you mean max-num-seqs?"),
        ("a.yaml", "1: 2", "has the key 1; keys are names of options"),
        ("a.yaml", "true: 2", "has the key True"),
        ("a.yaml", "serve: {port: 5}", "has the table serve; write its options at the top"),
        ("a.toml", "[serve]\nport = 5", "has the table serve"),
        ("a.yaml", "port: {a: 1}", 'unable to convert "{"a": 1}" into int'),
        ("a.yaml", "port: [1, 2]", 'unable to convert "[1, 2]" into int'),
        ("a.yaml", "port: yes", 'unable to convert "True" into int'),
        ("a.yaml", "port: 2020-01-01", 'unable to convert "2020-01-01" into int'),
        ("a.yaml", "access_log: maybe", 'unable to convert "maybe" into bool'),
        ("a.yaml", "model: [a, b]", "into str"),
        ("a.yaml", "max-num-seqs: 2.5", "must be a whole number"),
        ("a.yaml", "a: &a {b: *a}", "cannot be read: Circular reference"),
        ("a.yaml", "{a: " * 3000, "cannot be read"),
        ("a.yaml", b"model: \xff", "cannot be read: the input is not utf-8"),
        ("a.yaml", b"model: \x00", "cannot be read"),
    ],
)
def test_a_wrong_file_is_named(
    name: str, content: str | bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert run(["serve", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert error.count("\n") == 1
    assert run(["serve", "--show-config", "--config", str(path)]) == 2


def test_values_that_are_objects_null_and_vllms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An object is given as its JSON, null leaves an option unset, and an option of vLLM is answered as its flag is."""
    path = tmp_path / "a.yaml"
    path.write_text("speculative-config: {method: ngram, num_speculative_tokens: 3}\nport: null\nmodel: ä ö\n", "utf-8")
    options = shown(capsys, "--config", str(path))
    assert options["speculative-config"] == f'{{"method": "ngram", "num_speculative_tokens": 3}}  ({path})'
    assert options["port"] == "8000  (default)"
    assert options["model"] == f"ä ö  ({path})"
    path.write_text("enforce-eager: true\nhf-overrides: {a: 1}\n")
    assert run(["serve", "--config", str(path)]) == 2
    assert "hf_overrides is '{\"a\": 1}'; it must be {}" in capsys.readouterr().err


def test_other_commands_read_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("max-num-seqs: 5\n")
    monkeypatch.setenv("QUIRE_CONFIG", str(path))
    assert run(["plan", "--list-devices"]) == 0
    assert run(["plan", "--list-devices", "--config", str(path)]) == 2
    assert "Unknown option: --config" in capsys.readouterr().err


def test_a_wrong_variable_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_PORT", "x")
    assert run(["serve"]) == 2
    assert 'Invalid value for QUIRE_PORT from env: unable to convert "x" into int' in capsys.readouterr().err
