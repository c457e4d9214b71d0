"""Images that a request names by URL: fetched from allowed, public hosts only, within limits."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from quire.errors import RequestError
from quire.server import media_fetch
from quire.server.media_fetch import MediaFetcher, is_public

CONTENT = b"image" * 100


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name, _, rest = self.path[1:].partition("?")[0].partition("/")
        match name:
            case "image":
                self.answer(200, CONTENT)
            case "to":
                self.answer(302, b"", location=rest.replace("~", "//"))
            case "loop":
                self.answer(302, b"", location="/loop")
            case "large":
                self.answer(200, bytes(5000))
            case "slow":
                self.send_response(200)
                self.end_headers()
                for _ in range(40):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.05)
            case "drip":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
                for _ in range(60):
                    self.wfile.write(b"y")
                    time.sleep(0.05)
            case _:
                self.answer(404, b"")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def silent() -> Iterator[int]:
    """A port that accepts connections and says one byte of a handshake every 50 ms."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.sendall(b"\x16\x03\x03\x40\x00\x02")
                for _ in range(60):
                    connection.sendall(b"\0")
                    time.sleep(0.05)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def fetcher(*, public: bool = True) -> MediaFetcher:
    return MediaFetcher(
        ["img.example", "other.example"],
        4000,
        resolve=lambda host, port: ["127.0.0.1"],
        is_public=(lambda address: True) if public else is_public,
        seconds=0.5,
    )


def test_a_file_and_a_redirect(port: int) -> None:
    for path in ("image", "image?a=b", f"to/http:~other.example:{port}/image"):
        assert asyncio.run(fetcher().fetch(f"http://img.example:{port}/{path}")) == CONTENT


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://evil.example:{port}/image", "not of an allowed domain; allowed are img.example, other.example"),
        ("http://img.example.evil.example:{port}/image", "not of an allowed domain"),
        ("http://user@img.example:{port}/image", "not of an allowed domain"),
        ("http://127.0.0.1:{port}/image", "not of an allowed domain"),
        ("http://img.example:{port}/to/http:~evil.example/image", "not of an allowed domain"),
        ("http://img.example:{port}/to/file:~/etc/passwd", "neither a data URL nor http"),
        ("http://img.example:{port}/loop", "more than 3 redirects"),
        ("http://img.example:{port}/none", "status 404"),
        ("http://img.example:{port}/large", "more than 4,000 bytes"),
        ("http://img.example:{port}/slow", "0.5 seconds|timed out"),
        ("http://img.example:{port}/drip", "within 0.5 seconds"),
        ("https://img.example:{silent}/handshake", "within 0.5 seconds"),
        ("http://img.example:{port}/a b", "must be escaped"),
        ("http://img.example:{port}/a\r\nx:y", "must be escaped|not of an allowed|is no URL"),
        ("http://img.example:99999/image", "is no URL"),
        ("ftp://img.example/image", "neither a data URL nor http"),
        ("image.png", "neither a data URL nor http"),
    ],
)
def test_what_is_refused(url: str, reason: str, port: int, silent: int) -> None:
    started = time.monotonic()
    with pytest.raises(RequestError, match=reason):
        asyncio.run(fetcher().fetch(url.replace("{port}", str(port)).replace("{silent}", str(silent))))
    assert time.monotonic() - started < 2.5  # the slow ones take 3 seconds


def test_a_name_server_that_does_not_answer_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timeout ends a look-up; more of them than threads wait in turn, and each ends in its time."""
    monkeypatch.setattr(media_fetch, "_MAX_WAIT", 0.1)
    answered = threading.Event()

    def hang(host: str, port: int) -> list[str]:
        answered.wait(60)
        return ["127.0.0.1"]

    async def fetch_many() -> list[object]:
        hanging = MediaFetcher(["img.example"], 4000, resolve=hang, seconds=0.2)
        urls = [f"http://img.example/{number}" for number in range(media_fetch.MAX_FETCHES + 4)]
        return await asyncio.gather(*map(hanging.fetch, urls), return_exceptions=True)

    started = time.monotonic()
    found = asyncio.run(fetch_many())
    took = time.monotonic() - started
    answered.set()
    assert all(isinstance(each, RequestError) and "does not arrive within" in str(each) for each in found)
    assert took < 10


def test_a_host_whose_address_is_not_public(port: int) -> None:
    with pytest.raises(RequestError, match="address is not public"):
        asyncio.run(fetcher(public=False).fetch(f"http://img.example:{port}/image"))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "ff02::1"),
        *("2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b:1::1", "::7f00:1", "::ffff:0:127.0.0.1", "fec0::1", "5f00::1"),
        *("192.0.0.8", "192.88.99.1", "198.18.0.1", "240.0.0.1", "2001:0:7f00:1::", "2001:db8::1", "3fff::1"),
    ],
)
def test_other_addresses(address: str) -> None:
    assert not is_public(address)
