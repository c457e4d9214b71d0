"""TLS: https, certificates of clients, renewed files, and files that do not fit."""

import shutil
import ssl
import subprocess
from http.client import HTTPSConnection
from pathlib import Path

import pytest

from quire.cli.commands import run
from quire.errors import ConfigError
from quire.server.settings import ServerSettings
from quire.server.tls import tls_context
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, which makes certificates")


def certificate(folder: Path, name: str) -> tuple[str, str]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    made, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
        "-subj",
    ]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(made)]
    subprocess.run([*command, f"/CN={name}", *names], check=True, capture_output=True)
    return str(made), str(key)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    (cert, key), (other, other_key) = certificate(folder, "server"), certificate(folder, "client")
    both = folder / "both.pem"
    both.write_text(Path(cert).read_text() + Path(key).read_text())
    text = folder / "text.pem"
    text.write_text("no certificate")
    locked = folder / "locked.key"
    command = ["openssl", "ec", "-in", key, "-aes128", "-passout", "pass:x", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    made = {"cert": cert, "key": key, "other": other, "other_key": other_key, "both": str(both), "text": str(text)}
    return {**made, "locked": str(locked), "none": str(folder / "none.pem"), "folder": str(folder)}


def status(server: RunningServer, trusted: str, own: tuple[str, str] | None = None) -> int:
    context = ssl.create_default_context(cafile=trusted)
    if own is not None:
        context.load_cert_chain(*own)
    connection = HTTPSConnection("127.0.0.1", server.port, context=context, timeout=20)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    finally:
        connection.close()


def test_https(files: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServerSettings(port=0, ssl_certfile=files["cert"], ssl_keyfile=files["key"])
    with RunningServer(ScriptedEngine(max_model_len=4096), settings) as server:
        assert server.reports[0] == f"listening on https://127.0.0.1:{server.port}"
        assert status(server, files["cert"]) == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            status(server, files["other"])
        assert b"200" not in server.raw(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        # Quire's own clients, which trust what OpenSSL's variable names.
        url = f"https://127.0.0.1:{server.port}"
        assert run(["ps", "--url", url]) == 1
        assert "certificate verify failed" in capsys.readouterr().err
        monkeypatch.setenv("SSL_CERT_FILE", files["cert"])
        assert run(["ps", "--url", url]) == 0


def test_one_file_may_hold_both(files: dict[str, str]) -> None:
    with RunningServer(ScriptedEngine(), ServerSettings(port=0, ssl_certfile=files["both"])) as server:
        assert status(server, files["cert"]) == 200


@pytest.mark.parametrize(
    ("checked", "allowed"), [({}, False), ({"ssl_cert_reqs": 1}, True), ({"ssl_cert_reqs": 0}, True)]
)
def test_certificates_of_clients(files: dict[str, str], checked: dict[str, int], allowed: bool) -> None:
    settings = ServerSettings(
        port=0, ssl_certfile=files["cert"], ssl_keyfile=files["key"], ssl_ca_certs=files["other"], **checked
    )
    with RunningServer(ScriptedEngine(), settings) as server:
        assert status(server, files["cert"], (files["other"], files["other_key"])) == 200
        if allowed:
            assert status(server, files["cert"]) == 200
        else:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                status(server, files["cert"])


def test_renewed_files_hold_for_new_connections(files: dict[str, str], tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text(Path(files["cert"]).read_text())
    key.write_text(Path(files["key"]).read_text())
    settings = ServerSettings(port=0, ssl_certfile=str(cert), ssl_keyfile=str(key))
    with RunningServer(ScriptedEngine(), settings) as server:
        cert.write_text(Path(files["other"]).read_text())  # half of the renewal: the key does not fit yet
        assert status(server, files["cert"]) == 200
        key.write_text(Path(files["other_key"]).read_text())
        assert status(server, files["other"]) == 200


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ssl_certfile": "none"}, "none.pem is no file"),
        ({"ssl_certfile": "folder"}, "is no file"),
        ({"ssl_certfile": "cert", "ssl_keyfile": "other_key"}, "key values mismatch"),
        ({"ssl_certfile": "cert"}, r"ssl_certfile \S+ cannot be used"),
        ({"ssl_certfile": "text", "ssl_keyfile": "key"}, r"and ssl_keyfile \S+ cannot be used"),
        ({"ssl_certfile": "cert", "ssl_keyfile": "locked"}, "without a password"),
        ({"ssl_certfile": "both", "ssl_ca_certs": "text"}, "ssl_ca_certs"),
    ],
)
def test_files_that_do_not_fit(files: dict[str, str], given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tls_context(ServerSettings(**{name: files[value] for name, value in given.items()}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ssl_keyfile": "k"}, "ssl_keyfile is set without ssl_certfile"),
        ({"ssl_ca_certs": "k"}, "ssl_ca_certs is set without ssl_certfile"),
        ({"ssl_certfile": "c", "ssl_cert_reqs": 3}, "ssl_cert_reqs is 3; it must be 0, 1 or 2"),
        ({"ssl_certfile": "c", "ssl_cert_reqs": 2}, "without ssl_ca_certs"),
    ],
)
def test_options_that_do_not_fit(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ServerSettings(**given)  # type: ignore[arg-type]


def test_no_certificate_is_plain_http() -> None:
    assert tls_context(ServerSettings()) is None
