"""API keys in all places and forms: only the right key in the right place opens a route."""

from base64 import b64encode
from collections.abc import Iterator

import pytest

from quire.server.settings import ServerSettings
from tests.security.raw_requests import GOOD, get, post, statuses
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

KEY = "schlüssel-ключ-🔑"
BYTES = KEY.encode()

RIGHT: dict[str, tuple[bytes, ...]] = {
    "as bearer": (b"authorization: Bearer " + BYTES,),
    "the scheme in capitals": (b"AUTHORIZATION: BEARER " + BYTES,),
    "blanks around it": (b"authorization:   Bearer   " + BYTES + b"  ",),
    "as Anthropic's clients send it": (b"x-api-key: " + BYTES,),
}
WRONG: dict[str, tuple[bytes, ...]] = {
    "in a cookie": (b"cookie: authorization=Bearer " + BYTES,),
    "as the password of Basic": (b"authorization: Basic " + b64encode(b":" + BYTES),),
    "as the scheme": (b"authorization: " + BYTES,),
    "without a blank": (b"authorization: Bearer" + BYTES,),
    "behind a colon": (b"authorization: Bearer: " + BYTES,),
    "in quotes": (b'authorization: Bearer "' + BYTES + b'"',),
    "behind a comma": (b"authorization: Bearer x, Bearer " + BYTES,),
    "as a parameter": (b"authorization: Bearer token=" + BYTES,),
    "twice": (b"authorization: Bearer " + BYTES + b" " + BYTES,),
    "cut short": (b"authorization: Bearer " + BYTES[:-1],),
    "with more behind it": (b"authorization: Bearer " + BYTES + b"x",),
    "in capitals": (b"authorization: Bearer " + KEY.upper().encode(),),
    "in another normal form": (b"authorization: Bearer " + KEY.replace("ü", "u\u0308").encode(),),
    "in Latin-1": ("authorization: Bearer schlüssel-".encode("latin-1"),),
    "in UTF-16": (b"authorization: Bearer " + KEY.encode("utf-16-be").replace(b"\0", b"\x01"),),
    "escaped": (b"authorization: Bearer schl%C3%BCssel-%D0%BA%D0%BB%D1%8E%D1%87-%F0%9F%94%91",),
    "as its digest": (b"authorization: Bearer " + b"a" * 64,),
    "for a proxy": (b"proxy-authorization: Bearer " + BYTES,),
    "in Azure's header": (b"api-key: " + BYTES,),
    "in Google's header": (b"x-goog-api-key: " + BYTES,),
    "in a name with an underscore": (b"x_api_key: " + BYTES,),
    "in a forwarded header": (b"x-forwarded-authorization: Bearer " + BYTES,),
    "as a user": (b"x-remote-user: " + BYTES, b"x-forwarded-user: admin"),
    "hidden by a folded line": (b"x-a: b", b" authorization: Bearer " + BYTES),
    "in the other header beside a wrong one": (b"x-api-key: " + BYTES, b"authorization: Bearer wrong"),
    "in the other header with a scheme": (b"x-api-key: Bearer " + BYTES,),
    "of a hundred wrong ones": (b"authorization: Bearer wrong",) * 100,
    "from this machine": (b"x-forwarded-for: 127.0.0.1", b"x-real-ip: ::1"),
}
ROUTES = (b"/kv", b"/metrics", b"/v1/models", b"/openapi.json")
TARGETS: dict[str, bytes] = {
    "in the query": b"/kv?key=%b&api_key=%b&access_token=%b" % (BYTES, BYTES, BYTES),
    "in the user's name": b"http://%b:%b@127.0.0.1/kv" % (BYTES, BYTES),
    "a public route in front": b"/health/../kv",
    "a public route escaped": b"/health%2f..%2fkv",
    "a public route as parameter": b"/health;/../kv",
    "a public route behind a question mark": b"/kv?/health",
    "a public route behind a hash": b"/kv#/health",
    "doubled slashes": b"//kv",
    "a slash behind it": b"/kv/",
    "a dot": b"/./kv",
    "capitals": b"/KV",
    "NUL behind it": b"/kv%00",
    "a blank behind it": b"/kv%20",
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer(ScriptedEngine(), ServerSettings(port=0, api_key=(KEY,))) as running:
        yield running


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_key(server: RunningServer, name: str) -> None:
    assert statuses(server, post(GOOD, *RIGHT[name])) == [200]
    for route in ROUTES:
        assert statuses(server, get(route, *RIGHT[name])) == [200], route


@pytest.mark.parametrize("name", WRONG)
def test_a_key_in_no_right_place_or_form(server: RunningServer, name: str) -> None:
    assert statuses(server, post(GOOD, *WRONG[name])) in ([401], [400])
    for route in ROUTES:
        assert statuses(server, get(route, *WRONG[name])) in ([401], [400]), route


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS", b"POST"])
def test_a_target_that_hides_its_route(server: RunningServer, name: str, method: bytes) -> None:
    assert statuses(server, get(TARGETS[name], method=method)) in ([401], [400])
