"""Requests at the edges of HTTP: framing, targets, headers, encodings, forms. None becomes two requests, a 5xx or an
error in the log."""

import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire.server.settings import ServerSettings
from tests.security.raw_requests import GOOD, check, chunked, get, post, statuses
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine

STALL_SECONDS = 0.4
MAX_BODY = 1 << 20
CHUNKS = b"e\r\n%b\r\n0\r\n\r\n" % GOOD
NEXT = get(b"/v1/models")
"""A request that must not be found in the body of another."""


def transfer(*lines: bytes) -> bytes:
    return post(CHUNKS, *lines)


FRAMING: dict[str, bytes] = {
    "a chunk size with a plus": chunked(b"+e\r\n%b\r\n0\r\n\r\n" % GOOD),
    "a chunk size with an underscore": chunked(b"0_e\r\n%b\r\n0\r\n\r\n" % GOOD),
    "a blank before the chunk size": chunked(b" e\r\n%b\r\n0\r\n\r\n" % GOOD),
    "a blank behind the chunk size": chunked(b"e \r\n%b\r\n0\r\n\r\n" % GOOD),
    "a chunk size of zeros": chunked(b"0000000000000000000e\r\n%b\r\n0\r\n\r\n" % GOOD),
    "an extension without a name": chunked(b"e;\r\n%b\r\n0\r\n\r\n" % GOOD),
    "an extension with a line feed": chunked(b"e;a\nb\r\n%b\r\n0\r\n\r\n" % GOOD),
    "a quoted extension with lines": chunked(b'e;a="\r\n0\r\n\r\n"\r\n%b\r\n0\r\n\r\n' % GOOD),
    "a chunk size that ends in a line feed": chunked(b"e\n%b\r\n0\r\n\r\n" % GOOD),
    "a chunk that ends in a line feed": chunked(b"e\r\n%b\n0\r\n\r\n" % GOOD),
    "no end of line behind a chunk": chunked(b"e\r\n%b0\r\n\r\n" % GOOD),
    "the last chunk first": chunked(b"0\r\n\r\n" + CHUNKS),
    "a trailer of lengths": chunked(b"e\r\n%b\r\n0\r\ncontent-length: 3\r\ntransfer-encoding: x\r\n\r\n" % GOOD),
    "a trailer without a colon": chunked(b"e\r\n%b\r\n0\r\nnonsense\r\n\r\n" % GOOD),
    "chunks and identity": transfer(b"transfer-encoding: identity, chunked"),
    "identity": post(GOOD, b"transfer-encoding: identity"),
    "chunks in capitals": transfer(b"Transfer-Encoding: CHUNKED"),
    "chunks in quotes": transfer(b'transfer-encoding: "chunked"'),
    "chunks behind a tab": transfer(b"transfer-encoding:\tchunked"),
    "chunks behind another separator": transfer(b"transfer-encoding: \x0bchunked"),
    "chunks and a parameter": transfer(b"transfer-encoding: chunked;q=1"),
    "chunks in two lines": transfer(b"transfer-encoding: chunked", b"transfer-encoding: identity"),
    "an empty transfer": transfer(b"transfer-encoding:"),
    "chunks hidden by a folded line": transfer(b"x-a: b", b" transfer-encoding: chunked"),
    "chunks hidden by a bare CR": post(GOOD, b"x-a: b\rtransfer-encoding: chunked", b"content-length: 14"),
    "a length with 0x": post(GOOD, b"content-length: 0x0e"),
    "a length with an underscore": post(GOOD, b"content-length: 1_4"),
    "a length with a fraction": post(GOOD, b"content-length: 14.0"),
    "a length with an exponent": post(GOOD, b"content-length: 14e0"),
    "a length in other digits": post(GOOD, "content-length: ١٤".encode()),
    "a length of minus zero": post(GOOD, b"content-length: -0"),
    "a length with zeros": post(GOOD, b"content-length: 0000000014"),
    "a length beyond 64 bits": post(GOOD, b"content-length: 18446744073709551630"),
    "a length behind NUL": post(GOOD, b"content-length: \x0014"),
    "a length twice": post(GOOD, b"content-length: 14", b"content-length: 14"),
    "a request within a body": post(NEXT, b"content-length: %d" % len(NEXT)),
    "a request behind a length of 0": post(NEXT, b"content-length: 0"),
    "a GET with chunks": get(b"/health", b"transfer-encoding: chunked") + CHUNKS,
    "a HEAD with a body": get(b"/health", b"content-length: 14", method=b"HEAD") + GOOD,
    "a DELETE with a body": get(b"/v1/responses/x", b"content-length: 14", method=b"DELETE") + GOOD,
}

TARGETS: dict[str, bytes] = {
    "no target": b"GET HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
    "no version": b"GET /health\r\nhost: 127.0.0.1\r\n\r\n",
    "tabs in the request line": b"GET\t/health\tHTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
    "five words": b"GET /health x y HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
    "http in small letters": get(b"/health", version=b"http/1.1"),
    "a version of two digits": get(b"/health", version=b"HTTP/1.10"),
    "a version with a zero": get(b"/health", version=b"HTTP/01.1"),
    "blank lines before it": b"\r\n\r\n\r\n" + get(b"/health"),
    "a blank before it": b" " + get(b"/health"),
    "NUL before it": b"\0" + get(b"/health"),
    "a byte-order mark before it": b"\xef\xbb\xbf" + get(b"/health"),
    "blank lines only": b"\r\n" * 50 + b"x",
    "a method of 100,000 letters": b"G" * 100_000 + b" / HTTP/1.1\r\n\r\n",
    "a method with NUL": get(b"/health", method=b"G\0ET"),
    "CONNECT": get(b"127.0.0.1:22", method=b"CONNECT"),
    "CONNECT to nowhere": get(b"x", method=b"CONNECT"),
    "CONNECT to a path": get(b"/v1/models", method=b"CONNECT"),
    "a whole address with a name": get(b"http://user:pw@127.0.0.1/kv"),
    "a whole address with a port": get(b"http://127.0.0.1:1/kv"),
    "a whole address without a path": get(b"http://127.0.0.1"),
    "a whole address without a host": get(b"http:///kv"),
    "a whole address of files": get(b"file:///etc/passwd"),
    "a path that looks like an address": get(b"//elsewhere.example/kv"),
    "everything of GET": get(b"*"),
    "a fragment": get(b"/health#x"),
    "nothing behind a question mark": get(b"/health?"),
    "a query of 60,000 marks": get(b"/kv?" + b"&=" * 30_000),
    "a percent sign": get(b"/v1/models/%"),
    "half an escape": get(b"/v1/models/%4"),
    "an escape of other letters": get(b"/v1/models/%zz"),
    "an escape of a slash": get(b"/v1%2fmodels"),
    "escapes of dots": get(b"/v1/models/%2e%2e/%2e%2e/kv"),
    "an escape twice": get(b"/v1/models/%252e%252e%252fkv"),
    "an overlong escape": get(b"/v1/models/%c0%ae%c0%ae%c0%af"),
    "an escape of 16 bits": get(b"/v1/models/%u002e"),
    "escapes of line ends": get(b"/v1/models/x%0d%0aset-cookie:%20a=b"),
    "escapes of NUL": get(b"/v1/responses/x%00.json"),
    "backslashes": get(rb"/v1\models\..\..\etc\passwd"),
    "a path with parameters": get(b"/v1/models;a=b/;c"),
    "a path with dots": get(b"/./v1/./models/."),
    "a page file outside": get(b"/page/..%2f..%2fsettings.py"),
    "a name of 20,000 escapes": get(b"/v1/models/" + b"%41" * 20_000),
    "10,000 parts": get(b"/v1" + b"/a" * 10_000),
    "a right-to-left path": get("/v1/models/\u202esledom".encode()),
}

HEADERS: dict[str, bytes] = {
    name: post(GOOD, *lines)
    for name, lines in {
        "two hosts": (b"host: elsewhere.example",),
        "a host of others": (b"x-forwarded-host: elsewhere.example", b"forwarded: host=x;proto=https"),
        "an address of others": (b"x-forwarded-for: ::1, 127.0.0.1, \xff", b"x-real-ip: '"),
        "another method": (b"x-http-method-override: DELETE",),
        "another path": (b"x-original-url: /kv", b"x-rewrite-url: /kv"),
        "a name in brackets": (b"x(a): b",),
        "a name of odd bytes": (b"x-\xff: b",),
        "a name of 60,000 bytes": (b"x" * 60_000 + b": b",),
        "a value of separators": (b"x-a: \x01\x02\x0b\x0c\x7f",),
        "an id of line ends": (b"x-request-id: a%0d%0ab",),
        "an id of odd bytes": (b"x-request-id: \xff\xfe",),
        "an id of 60,000 bytes": (b"x-request-id: " + b"i" * 60_000,),
        "an id twice": (b"x-request-id: a", b"x-request-id: b"),
        "a timeout of NaN": (b"x-request-timeout: nan",),
        "a timeout below 0": (b"x-request-timeout: -1",),
        "a timeout without end": (b"x-request-timeout: 1e999",),
        "a timeout with an underscore": (b"x-request-timeout: 1_0",),
        "a timeout in other digits": ("x-request-timeout: ٣".encode(),),
        "a trace of nonsense": (b"traceparent: 00-zz-\xff-01", b"tracestate: =,=,=", b"baggage: \xff"),
        "a range": (b"range: bytes=0-0,-1,5-2",),
        "conditions": (b"if-none-match: *", b"if-match: x", b"if-modified-since: 99999999999"),
        "cookies of 50,000 bytes": (b"cookie: " + b"a=b;" * 12_000,),
        "accepted by nobody": (b"accept: image/png;q=nan", b"accept-encoding: br;q=-1", b"accept-charset: \xff"),
        "an origin of nonsense": (b"origin: http://\xff[::1",),
        "a thousand origins": (b"origin: " + b"http://a " * 1000,),
        "connection of everything": (b"connection: close, upgrade, keep-alive, transfer-encoding, host, \xff",),
        "keep-alive of nonsense": (b"connection: keep-alive", b"keep-alive: timeout=-1, max=99999999999999999999"),
        "an upgrade to websocket": (
            b"connection: upgrade",
            b"upgrade: websocket",
            b"sec-websocket-version: 13",
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
        ),
        "an upgrade of settings": (b"connection: upgrade, http2-settings", b"upgrade: h2c", b"http2-settings: \xff"),
        "upgrades of everything": (b"connection: upgrade", b"upgrade: h2c, websocket, TLS/1.2, foo/\xff"),
        "a proxy's authorization": (b"proxy-authorization: Basic eDp5", b"proxy-connection: keep-alive"),
        "a router's words of nonsense": (b"x-quire-stream: {", b"x-quire-prompt: \xff", b"x-quire-prefilled: x"),
        "to be continued": (b"expect: 100-continue",),
        "to be continued twice": (b"expect: 100-continue, 100-continue", b"expect: 100-continue"),
    }.items()
} | {
    "metrics accepted by nobody": get(b"/metrics", b"accept: application/openmetrics-text;q=nan;version=\xff,;;=,q"),
    "ranges of the page": get(b"/", b"range: bytes=9-1,-0,a-b,0-99999999999999999999", b"if-range: \xff"),
    "conditions of the page": get(b"/", b"if-none-match: W/\xff", b"if-modified-since: Fri, 99 Foo 99999 99:99:99"),
    "no host": b"POST /v1/completions HTTP/1.1\r\nconnection: close\r\ncontent-length: 14\r\n\r\n" + GOOD,
    "an empty host": b"GET /kv HTTP/1.1\r\nhost:\r\nconnection: close\r\n\r\n",
    "a host with a name": b"GET /kv HTTP/1.1\r\nhost: a@127.0.0.1\r\nconnection: close\r\n\r\n",
    "a host with another port": b"GET /kv HTTP/1.1\r\nhost: 127.0.0.1:999999\r\nconnection: close\r\n\r\n",
    "half an address": b"GET /kv HTTP/1.1\r\nhost: [::1\r\nconnection: close\r\n\r\n",
    "a host of odd bytes": b"GET /kv HTTP/1.1\r\nhost: \xff\xfe\r\nconnection: close\r\n\r\n",
    "a host of 50,000 bytes": b"GET /kv HTTP/1.1\r\nhost: %b\r\nconnection: close\r\n\r\n" % (b"h." * 25_000),
    "a question before a request": get(
        b"/v1/completions",
        b"origin: http://localhost",
        b"access-control-request-method: \xff",
        b"access-control-request-headers: " + b"x," * 20_000,
        method=b"OPTIONS",
    ),
}

BOMB = b"[" * (MAX_BODY + 1)
MANY = b'{"prompt":"x","a":%b}'
BODIES: dict[str, bytes] = {
    "gzip of nothing": post(b"", b"content-encoding: gzip"),
    "gzip in two parts": post(gzip.compress(GOOD[:7]) + gzip.compress(GOOD[7:]), b"content-encoding: gzip"),
    "a thousand bombs": post(gzip.compress(BOMB) * 100, b"content-encoding: gzip"),
    "a bomb of zlib": post(zlib.compress(BOMB), b"content-encoding: deflate"),
    "a bomb without a header": post(zlib.compress(BOMB, wbits=-15), b"content-encoding: deflate"),
    "a bomb in chunks of a byte": post(
        b"".join(b"1\r\n%c\r\n" % byte for byte in gzip.compress(BOMB)) + b"0\r\n\r\n",
        b"content-encoding: gzip",
        b"transfer-encoding: chunked",
    ),
    "an encoding in two lines": post(GOOD, b"content-encoding: identity", b"content-encoding: gzip"),
    "an encoding of odd bytes": post(GOOD, b"content-encoding: \xff"),
    "a weighted encoding": post(gzip.compress(GOOD), b"content-encoding: gzip;q=1"),
    "a wrong checksum": post(gzip.compress(GOOD)[:-8] + bytes(8), b"content-encoding: gzip"),
    "300,000 zeros": post(MANY % (b"[" + b"0," * 299_999 + b"0]")),
    "20,000 fields": post(b"{" + b",".join(b'"a%d":1' % number for number in range(20_000)) + b"}"),
    "100,000 escapes": post(MANY % (b'"' + rb"\u0041" * 100_000 + b'"')),
    "a number of 900,000 digits": post(MANY % (b"1" * 900_000)),
    "a fraction of 900,000 digits": post(MANY % (b"0." + b"1" * 900_000)),
    "an exponent below all": post(b'{"prompt":"x","temperature":1e-999999999}'),
    "minus zero": post(b'{"prompt":"x","max_tokens":-0,"temperature":-0.0}'),
    "whole numbers with a fraction": post(b'{"prompt":"x","max_tokens":2.0,"n":1.0}'),
    "whole numbers with an exponent": post(b'{"prompt":"x","max_tokens":1e1}'),
    "brackets in a text": post(json.dumps({"prompt": "[{" * 100}).encode()),
    "an unfinished escape": post(rb'{"prompt":"\u00'),
    "a key of surrogates": post(rb'{"prompt":"x","\ud800":1}'),
    "the separator of lines": post('{"prompt":"\u2028\u2029\ufeff\ufffe"}'.encode()),
    "deep in a field that nobody reads": post(MANY % (b"[" * 49_000 + b"]" * 49_000)),
}

PART = b'content-disposition: form-data; name="%b"; filename="%b"\r\n\r\n'
FORMS: dict[str, tuple[bytes, bytes]] = {
    "no boundary": (b"multipart/form-data", b"--b\r\n"),
    "an empty boundary": (b"multipart/form-data; boundary=", b"--\r\n"),
    "a boundary of 10,000 bytes": (b"multipart/form-data; boundary=" + b"b" * 10_000, b"--b\r\n"),
    "a boundary of odd bytes": (b"multipart/form-data; boundary=\xff\xfe", b"--\xff\xfe\r\n"),
    "no parts": (b"multipart/form-data; boundary=b", b"--b--\r\n"),
    "no last boundary": (b"multipart/form-data; boundary=b", b"--b\r\n" + PART % (b"file", b"x") + b"data"),
    "10,000 parts": (b"multipart/form-data; boundary=b", (b"--b\r\n" + PART % (b"a", b"b")) * 10_000 + b"--b--"),
    "a part without a name": (b"multipart/form-data; boundary=b", b"--b\r\n\r\nx\r\n--b--\r\n"),
    "a part with 10,000 headers": (
        b"multipart/form-data; boundary=b",
        b"--b\r\n" + b"x: y\r\n" * 10_000 + b"\r\nx\r\n--b--\r\n",
    ),
    "a file name out of the folder": (
        b"multipart/form-data; boundary=b",
        b"--b\r\n" + PART % (b"file", b"../../../etc/passwd\0") + b"x\r\n--b--\r\n",
    ),
    "parts in parts": (
        b"multipart/form-data; boundary=b",
        b"--b\r\ncontent-type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\n--c--\r\n--b--\r\n",
    ),
    "JSON instead of a form": (b"application/json", GOOD),
    "a purpose twice": (
        b"multipart/form-data; boundary=b",
        2 * (b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n') + b"--b--\r\n",
    ),
}

ODD = {**FRAMING, **TARGETS, **HEADERS, **BODIES}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder: Path = tmp_path_factory.mktemp("batches")
    settings = ServerSettings(port=0, stall_timeout=STALL_SECONDS, max_body_size=MAX_BODY, batch_dir=str(folder))
    with RunningServer(ScriptedEngine(), settings) as running:
        yield running


def test_no_two_requests_have_one_name() -> None:
    assert len(ODD) == len(FRAMING) + len(TARGETS) + len(HEADERS) + len(BODIES)


@pytest.mark.parametrize("name", ODD)
def test_an_odd_request_is_one_request(server: RunningServer, name: str, caplog: pytest.LogCaptureFixture) -> None:
    answered(server, ODD[name], caplog)


# Starlette leaves a file that is cut short to Python, which closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", FORMS)
def test_an_odd_form(server: RunningServer, name: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, body = FORMS[name]
    found = answered(server, post(body, b"content-type: " + kind, path=b"/v1/files"), caplog)
    assert found
    assert found[0] >= 400


def answered(server: RunningServer, request: bytes, caplog: pytest.LogCaptureFixture) -> list[int]:
    """The statuses of the answers; the next client gets its right one."""
    engine = server.engine
    assert isinstance(engine, ScriptedEngine)
    num_calls = len(engine.calls)
    with caplog.at_level(logging.ERROR):
        found = statuses(server, request)
    check(found)
    assert len(found) <= 1, found
    assert len(engine.calls) <= num_calls + 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert server.send("POST", "/v1/completions", {"prompt": "x"})[1]["choices"][0]["text"] == ANSWER
    assert engine.num_running == 0
    return found
