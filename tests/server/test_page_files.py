"""The page at /: complete, small, its own, and unable to make HTML of a text."""

import re
from pathlib import Path

import pytest

from quire.server.page_files import FOLDER
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

FILES = sorted(FOLDER.iterdir())
MAX_BYTES = 150_000


def test_every_file_is_served_without_a_key_and_asked_for_once(engine: ScriptedEngine) -> None:
    with RunningServer(engine, ServerSettings(port=0, api_key=("secret",))) as server:
        for path in FILES:
            route = "/" if path.name == "index.html" else f"/page/{path.name}"
            response, _ = server.send("GET", route)
            assert response.status == 200
            assert int(response.headers["content-length"]) == path.stat().st_size
            etag = response.headers["etag"]
            assert server.send("GET", route, headers={"if-none-match": etag})[0].status == 304
            assert server.send("GET", route, headers={"if-none-match": f'W/{etag}, "x"'})[0].status == 304
            assert server.send("GET", route, headers={"if-none-match": '"x"'})[0].status == 200
        assert server.send("GET", "/page/../page_files.py")[0].status in (401, 404)
        assert server.send("GET", "/v1/models")[0].status == 401


def test_the_policy_lets_the_page_reach_this_server_only(server: RunningServer) -> None:
    response, page = server.send("GET", "/")
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|style=", page)


def test_the_page_is_small_and_refers_to_its_own_files_by_relative_urls() -> None:
    assert sum(path.stat().st_size for path in FILES) <= MAX_BYTES
    names = {path.name for path in FILES}
    for path in FILES:
        text = path.read_text()
        urls = re.findall(r'(?:src|href)="([^"#][^"]*)"', text) + re.findall(r'from "([^"]+)"', text)
        for url in urls:
            assert url in ("docs",) or url.removeprefix("page/").removeprefix("./") in names, f"{path.name}: {url}"
        assert not re.search(r"https?://(?!www\.w3\.org/)|@import", text), path.name


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".js"], ids=lambda path: path.name)
def test_no_file_makes_html_or_code_of_a_text(path: Path) -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", path.read_text()
    )


def test_pages_of_this_server_may_call_it_under_its_names(engine: ScriptedEngine) -> None:
    settings = ServerSettings(port=0, host="127.0.0.1", allowed_hosts=("llm.example",))
    body = {"prompt": "a", "max_tokens": 1}
    with RunningServer(engine, settings) as server:
        for host, origin, status in (
            ("llm.example", "https://llm.example", 200),
            ("192.168.1.5:8000", "http://192.168.1.5:8000", 200),
            ("llm.example", "https://evil.example", 403),
            ("evil.example", "http://evil.example", 403),
            ("192.168.1.5:8000", "http://192.168.1.5:9000", 403),
            ("llm.example", "null", 200),  # a program's JSON, as before
        ):
            headers = {"host": host, "origin": origin}
            assert server.send("POST", "/v1/completions", body, headers)[0].status == status, (host, origin)


def test_a_host_list_of_all_names_no_page_its_own(engine: ScriptedEngine) -> None:
    with RunningServer(engine, ServerSettings(port=0, allowed_hosts=("*",))) as server:
        headers = {"host": "evil.example", "origin": "http://evil.example"}
        assert server.send("POST", "/v1/completions", {"prompt": "a"}, headers)[0].status == 403
