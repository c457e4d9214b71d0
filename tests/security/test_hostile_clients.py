"""Clients that lie, abort and exaggerate: each gets a success, a 4xx or a closed connection, and the next client its
right answer."""

import gzip
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from quire.server.settings import ServerSettings
from tests.security.raw_requests import GOOD, check, chunked, get, post, statuses
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine

STALL_SECONDS = 0.4

FRAMES: dict[str, bytes] = {
    "a negative length": post(GOOD, b"content-length: -1"),
    "a signed length": post(GOOD, b"content-length: +14"),
    "a length of thirty digits": post(GOOD, b"content-length: " + b"9" * 30),
    "a length in words": post(GOOD, b"content-length: ten"),
    "an empty length": post(GOOD, b"content-length:"),
    "two lengths": post(GOOD, b"content-length: 14", b"content-length: 5"),
    "a list of lengths": post(GOOD, b"content-length: 14, 14"),
    "a length and chunks": post(b"e\r\n%b\r\n0\r\n\r\n" % GOOD, b"content-length: 14", b"transfer-encoding: chunked"),
    "a body shorter than its length": post(GOOD, b"content-length: 99"),
    "a body longer than its length": post(GOOD * 3),
    "chunks named twice": post(b"e\r\n%b\r\n0\r\n\r\n" % GOOD, b"transfer-encoding: chunked, chunked"),
    "chunks that are not last": post(b"e\r\n%b\r\n0\r\n\r\n" % GOOD, b"transfer-encoding: chunked, gzip"),
    "an unknown transfer": post(GOOD, b"transfer-encoding: xchunked"),
    "a negative chunk": chunked(b"-1\r\nx\r\n0\r\n\r\n"),
    "a chunk beyond 64 bits": chunked(b"F" * 17 + b"\r\nx\r\n0\r\n\r\n"),
    "a chunk size with 0x": chunked(b"0xe\r\n%b\r\n0\r\n\r\n" % GOOD),
    "a chunk without a size": chunked(b"\r\n%b\r\n0\r\n\r\n" % GOOD),
    "a chunk that promises too much": chunked(b"ff\r\n%b" % GOOD),
    "a chunk that runs over": chunked(b"2\r\n%b\r\n0\r\n\r\n" % GOOD),
    "no last chunk": chunked(b"e\r\n%b\r\n" % GOOD),
    "a header without a colon": post(GOOD, b"nonsense"),
    "a header without a name": post(GOOD, b": x"),
    "a blank before the colon": post(GOOD, b"x-a : b"),
    "a folded header": post(GOOD, b"x-a: b\r\n c"),
    "a header with NUL": post(GOOD, b"x-a: b\0c"),
    "a header with a bare CR": post(GOOD, b"x-a: b\rc"),
    "a header of odd bytes": post(GOOD, b"x-a: \xff\xfe\x80"),
    "five thousand headers": post(GOOD, *(b"x-%d: y" % number for number in range(5000))),
    "a header of a megabyte": post(GOOD, b"x-a: " + b"y" * 2**20),
    "bare line feeds": post(GOOD).replace(b"\r\n", b"\n"),
    "HTTP/1.0": post(GOOD, version=b"1.0"),
    "HTTP/1.0 with chunks": post(b"e\r\n%b\r\n0\r\n\r\n" % GOOD, b"transfer-encoding: chunked", version=b"1.0"),
    "HTTP/1.9": post(GOOD, version=b"1.9"),
    "HTTP/3.0": post(GOOD, version=b"3.0"),
    "HTTP/0.9": b"GET /health\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "a TLS hello": bytes.fromhex("1603010200010001fc0303") + bytes(500),
    "a method in small letters": get(b"/health", method=b"get"),
    "an unknown method": get(b"/health", method=b"FROB"),
    "TRACE": get(b"/health", method=b"TRACE"),
    "HEAD": get(b"/v1/completions", method=b"HEAD"),
    "OPTIONS of everything": get(b"*", method=b"OPTIONS"),
    "two blanks in the request line": get(b" /health"),
    "a path with NUL": get(b"/v1/models/%00"),
    "a path out of the root": get(b"/v1/../../%2e%2e/etc/passwd"),
    "a path that is no text": get(b"/v1/models/%ff%fe"),
    "a path of odd bytes": get(b"/v1/models/\xff\xfe"),
    "a path of doubled slashes": get(b"//v1//models"),
    "a path of 60,000 characters": get(b"/" + b"a" * 60_000),
    "a whole address": get(b"http://elsewhere.example/health"),
    "an address alone": get(b"elsewhere.example:443"),
    "a query of odd bytes": get(b"/kv?\xff=%zz&&=&a"),
    "an unknown expectation": post(GOOD, b"expect: 200-maybe"),
    "a GET with a body": get(b"/health", b"content-length: 14") + GOOD,
    "garbage behind the request": post(GOOD) + bytes(range(256)),
    "ten requests at once": get(b"/health").replace(b"connection: close\r\n", b"") * 9 + post(GOOD),
}

BODIES: dict[str, bytes | tuple[bytes, bytes]] = {
    "1e999": b'{"prompt":"x","temperature":1e999}',
    "an integer of 5,000 digits": b'{"prompt":"x","n":%b}' % (b"9" * 5000),
    "an exponent of 5,000 digits": b'{"prompt":"x","top_p":1e%b}' % (b"9" * 5000),
    "NaN": b'{"prompt":"x","temperature":NaN}',
    "-Infinity": b'{"prompt":"x","temperature":-Infinity}',
    "a hexadecimal number": b'{"prompt":"x","n":0x1}',
    "a leading zero": b'{"prompt":"x","n":01}',
    "lists 100,000 deep": b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "objects 100,000 deep": b'{"x":' * 100_000 + b"1" + b"}" * 100_000,
    "a deep list that never ends": b"[" * 100_000,
    "a key twice": b'{"prompt":"x","n":1,"n":2,"prompt":"y"}',
    "a byte-order mark": b"\xef\xbb\xbf" + GOOD,
    "two byte-order marks": b"\xef\xbb\xbf" * 2 + GOOD,
    "UTF-16": GOOD.decode().encode("utf-16"),
    "UTF-32": GOOD.decode().encode("utf-32"),
    "a lone surrogate": rb'{"prompt":"\ud800"}',
    "surrogates the wrong way round": rb'{"prompt":"\udc00\ud800 x"}',
    "a lone surrogate as a stop": rb'{"prompt":"x","stop":["\udfff"]}',
    "a lone surrogate as a user": rb'{"prompt":"x","user":"\ud800","cache_salt":"\ud800"}',
    "bytes that are no UTF-8": b'{"prompt":"\xff\xfe"}',
    "an overlong NUL": b'{"prompt":"\xc0\x80"}',
    "a NUL": rb'{"prompt":"\u0000"}',
    "a raw line feed": b'{"prompt":"\n"}',
    "a trailing comma": b'{"prompt":"x",}',
    "comments": b'{"prompt":"x"/* no */}',
    "nothing": b"",
    "blanks": b" " * 9999,
    "null": b"null",
    "a list": b"[]",
    "two documents": GOOD * 2,
    "NULs behind the document": GOOD + bytes(99),
    "names of Python": b'{"prompt":"x","__class__":{"a":1},"__dict__":1,"":2}',
    "a name of 100,000 characters": b'{"prompt":"x","%b":1}' % (b"k" * 100_000),
    "a name that is no word": '{"prompt":"x","ключ":1,"\u202e":2,"\u2028":3}'.encode(),
    "a form": (b"prompt=x", b"content-type: application/x-www-form-urlencoded"),
    "a form of parts": (b"--b\r\n\r\nx\r\n--b--", b"content-type: multipart/form-data; boundary=b"),
    "XML": (b"<a/>", b"content-type: application/xml"),
    "two types": (GOOD, b"content-type: application/json, text/html"),
    "another charset": (GOOD, b"content-type: application/json; charset=utf-16"),
    "a type of odd bytes": (GOOD, b"content-type: \xff\xfe"),
    "a gzip bomb": (gzip.compress(b"[" * 50_000_000, 1), b"content-encoding: gzip"),
    "gzip in gzip": (gzip.compress(gzip.compress(GOOD)), b"content-encoding: gzip, gzip"),
    "gzip that is none": (GOOD, b"content-encoding: gzip"),
    "gzip cut short": (gzip.compress(GOOD)[:-9], b"content-encoding: gzip"),
    "gzip and garbage": (gzip.compress(GOOD) + b"garbage", b"content-encoding: gzip"),
    "brotli": (GOOD, b"content-encoding: br"),
}

FIELDS: dict[str, dict[str, Any]] = {
    "n and best_of": {"n": 10**6, "best_of": 10**9},
    "many prompts and samples": {"prompt": ["x"] * 1000, "n": 128},
    "best_of below n": {"n": 3, "best_of": 2},
    "bias of 1e308": {"logit_bias": {"5": 1e308}},
    "bias of an unknown token": {"logit_bias": {"-1": 1, str(2**31): 1, str(2**64): 1}},
    "bias of a fraction": {"logit_bias": {"1.5": 1}},
    "bias of other digits": {"logit_bias": {"١": 1, "⁵": 1}},
    "bias of text": {"logit_bias": {"": 1}},
    "many stops": {"stop": ["s"] * 5000},
    "empty stops": {"stop": ["", ""]},
    "a stop of a megabyte": {"stop": "s" * 2**20},
    "stops of every kind": {"stop": [1, None, "x"]},
    "stop tokens out of range": {"stop_token_ids": [-1, 2**31, 2**63]},
    "a seed of 64 bits": {"seed": 2**64 - 1},
    "a seed below 64 bits": {"seed": -(2**63) - 1},
    "a seed of 300 bits": {"seed": 2**300},
    "temperature 1e308": {"temperature": 1e308},
    "a subnormal temperature": {"temperature": 5e-324},
    "top_p 0": {"top_p": 0},
    "a subnormal top_p": {"top_p": 5e-324},
    "top_k below all": {"top_k": -(2**31)},
    "a subnormal penalty": {"repetition_penalty": 5e-324},
    "max_tokens 0": {"max_tokens": 0},
    "max_tokens of 63 bits": {"max_tokens": 2**63 - 1},
    "max_tokens in text": {"max_tokens": "٣"},
    "min above max": {"min_tokens": 9, "max_tokens": 3},
    "logprobs without end": {"logprobs": 2**40},
    "prompt logprobs and echo": {"prompt_logprobs": 2**31, "echo": True, "logprobs": 0},
    "an empty prompt": {"prompt": ""},
    "no prompts": {"prompt": []},
    "empty token lists": {"prompt": [[], []]},
    "tokens below 0": {"prompt": [-1]},
    "tokens out of range": {"prompt": [2**31]},
    "fractions as tokens": {"prompt": [1.5]},
    "booleans as tokens": {"prompt": [True, None]},
    "prompts in prompts": {"prompt": [[[1]]]},
    "a truncation below 0": {"truncate_prompt_tokens": -5},
    "a truncation of 40 bits": {"truncate_prompt_tokens": 2**40},
    "a priority of 70 bits": {"priority": 2**70},
    "a salt of a megabyte": {"cache_salt": "s" * 2**20},
    "a user of a megabyte": {"user": "u" * 2**20},
    "a model of a megabyte": {"model": "m" * 2**20},
    "a model of odd characters": {"model": "../\u0000\u202e\ud7ff💥"},
    "a list of models": {"model": ["scripted"]},
    "stream options of nonsense": {"stream_options": {"include_usage": "maybe"}, "stream": 2},
    "an unknown format": {"response_format": {"type": "💥"}},
    "a format of megabytes": {
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"x": "y" * 2**20}}}
    },
    "two constraints": {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    "an expression of brackets": {"structured_outputs": {"regex": "(" * 5000 + ")" * 5000}},
    "an empty choice": {"structured_outputs": {"choice": []}},
    "bad words of nothing": {"bad_words": ["", " ", "\u0000"]},
    "allowed tokens of none": {"allowed_token_ids": []},
    "parameters of an object": {"temperature": {}, "n": [], "stop": {}},
}

KEYS: dict[str, tuple[bytes, ...]] = {
    "none": (),
    "a key of odd bytes": (b"authorization: Bearer \xff\xfe\x80",),
    "no key behind the scheme": (b"authorization: Bearer",),
    "blanks as a key": (b"authorization: Bearer \t ",),
    "two words": (b"authorization: Bearer right wrong",),
    "another scheme": (b"authorization: Basic cmlnaHQ6",),
    "a key of 30,000 bytes": (b"authorization: Bearer " + b"k" * 30_000,),
    "the digest": (b"authorization: Bearer " + b"a" * 64,),
    "the right one first and a wrong one": (b"authorization: Bearer right", b"authorization: Bearer wrong"),
    "the key in the other header, empty": (b"x-api-key:",),
    "the key in another case": (b"authorization: Bearer RIGHT",),
    "the key in a query": (b"x-original-url: /?key=right",),
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer(ScriptedEngine(), ServerSettings(port=0, stall_timeout=STALL_SECONDS)) as running:
        yield running


@pytest.fixture(autouse=True)
def neighbour(server: RunningServer) -> Iterator[None]:
    """Behind each variant the next client is answered, and nothing runs on."""
    yield
    assert server.send("POST", "/v1/completions", {"prompt": "x"})[1]["choices"][0]["text"] == ANSWER
    assert server.engine.num_running == 0  # type: ignore[attr-defined]


def test_a_good_request_is_answered(server: RunningServer) -> None:
    for request in (post(), chunked(b"e\r\n%b\r\n0\r\n\r\n" % GOOD), get(b"/health")):
        assert statuses(server, request) == [200]


@pytest.mark.parametrize("name", FRAMES)
def test_bytes_that_are_no_request(server: RunningServer, name: str) -> None:
    check(statuses(server, FRAMES[name]))


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_request(server: RunningServer, name: str) -> None:
    given = BODIES[name]
    body, header = given if isinstance(given, tuple) else (given, b"x-a: b")
    found = statuses(server, post(body, header))
    check(found)
    assert len(found) == 1


@pytest.mark.parametrize("name", FIELDS)
def test_fields_beyond_all_sense(server: RunningServer, name: str) -> None:
    for stream in (False, True):
        body = {"prompt": "x", "max_tokens": 2, "stream": stream, **FIELDS[name]}
        found = statuses(server, post(json.dumps(body).encode()))
        check(found)
        assert len(found) == 1


def test_odd_keys_open_nothing() -> None:
    with RunningServer(ScriptedEngine(), ServerSettings(port=0, api_key=("right",))) as guarded:
        for name, headers in KEYS.items():
            for request in (post(GOOD, *headers), get(b"/kv", *headers)):
                found = statuses(guarded, request)
                assert found in ([401], [400], [431]), (name, found)
        assert statuses(guarded, post(GOOD, b"authorization: Bearer right")) == [200]


def reset(connection: socket.socket) -> None:
    """Close without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def wait_until_idle(engine: Any) -> None:
    """Wait until no request runs: those of clients that left are aborted."""
    deadline = time.monotonic() + 20
    while engine.num_running:
        assert time.monotonic() < deadline, f"{engine.num_running} requests run on without a client"
        time.sleep(0.01)


@pytest.mark.parametrize("end", [socket.socket.close, reset, lambda it: it.shutdown(socket.SHUT_WR)])
def test_a_client_that_leaves_at_any_moment(server: RunningServer, end: Callable[[socket.socket], None]) -> None:
    engine: Any = server.engine
    engine.endless, engine.delay = True, 0.002
    try:
        request = post(b'{"prompt":"x","stream":true,"max_tokens":9999}'.ljust(80))
        moments = [0, 9, 40, request.index(b"\r\n\r\n") + 4, len(request) - 20, len(request)]
        for count in [*moments, -1]:
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
                connection.sendall(request if count < 0 else request[:count])
                if count < 0:
                    connection.recv(100)
                end(connection)
    finally:
        engine.endless, engine.delay = False, 0.0
    wait_until_idle(engine)


def test_an_abort_within_pipelined_requests(server: RunningServer) -> None:
    """The first is answered slowly; the client leaves with three more on the way."""
    engine: Any = server.engine
    engine.delay = 0.05
    request = post(GOOD).replace(b"connection: close\r\n", b"")
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(request * 4)
            time.sleep(0.1)
            reset(connection)
    finally:
        engine.delay = 0.0
    wait_until_idle(engine)
