"""The page in a real browser: chat, memory, lessons, and an engine that dies under an answer.

With QUIRE_SCREENSHOTS=FOLDER the tests also write the pictures of the docs (`make test-page`).
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from quire import AsyncLLM
from quire.server.settings import ServerSettings
from tests.server.page.conftest import TIMEOUT_MS
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine

PROMPT = "What light through yonder window breaks? It is the east, and Juliet is the sun. Arise, fair sun."
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
MAX_PICTURE_BYTES = 100_000
AXE = Path(__file__).parents[3] / ".venv/axe.min.js"
"""axe-core, which `make test-page` fetches from npm. It is no part of the package."""


@pytest.fixture
def scripted() -> Iterator[RunningServer]:
    with RunningServer(ScriptedEngine(delay=0.005)) as server:
        yield server


def set_parameters(page: Any, **values: Any) -> None:
    if not page.is_visible("input[name=n]"):
        page.click("summary:has-text('Parameters')")
    for name, value in values.items():
        page.fill(f"[name={name}]", str(value))


def ask(page: Any, text: str, *, wait: bool = True) -> None:
    page.fill("#prompt", text)
    page.click("#send")
    if wait:
        page.wait_for_selector("#send:not([disabled])")


def answers(page: Any) -> list[str]:
    texts: list[str] = page.locator("article[aria-label=assistant] .text").all_inner_texts()
    return texts


def until(page: Any, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        page.wait_for_timeout(30)


def picture(page: Any, name: str, height: int = 620) -> None:
    """Write a picture for the docs, where that is asked for."""
    if folder := os.environ.get("QUIRE_SCREENSHOTS"):
        path = Path(folder) / name
        page.set_viewport_size({"width": 900, "height": height})
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(300)
        page.screenshot(path=path)
        with Image.open(path) as shot:
            few_colours = shot.convert("RGB").quantize(256)
        few_colours.save(path, optimize=True)
        assert path.stat().st_size <= MAX_PICTURE_BYTES, name


def test_a_chat_streams_and_says_what_it_cost(scripted: RunningServer, open_page: Any) -> None:
    engine: Any = scripted.engine
    engine.delay = 0.5
    page = open_page(scripted)
    ask(page, "Speak!", wait=False)
    until(page, lambda: 0 < len("".join(answers(page))) < len(ANSWER))
    engine.delay = 0.005
    page.wait_for_selector("#send:not([disabled])")
    assert answers(page) == [ANSWER]
    facts = page.inner_text("article[aria-label=assistant] .facts")
    assert "first token" in facts
    assert "tokens/s" in facts
    assert "prompt tokens from the cache" in facts
    page.reload()
    page.wait_for_selector("article")
    assert answers(page) == [ANSWER]


def test_the_chat_works_behind_a_prefix(open_page: Any) -> None:
    with RunningServer(ScriptedEngine(), ServerSettings(port=0, root_path="/llm")) as server:
        page = open_page(server)
        page.goto(f"{server.url}/llm")
        ask(page, "Hello")
        assert answers(page) == [ANSWER]
        page.goto(f"{server.url}/llm/#memory")
        until(page, lambda: "blocks of" in page.inner_text("#summary"))


def test_texts_never_become_html(scripted: RunningServer, open_page: Any) -> None:
    scripted.engine.answer = f"```\n{HOSTILE}\n``` {HOSTILE}"  # type: ignore[attr-defined]
    page = open_page(scripted, may_log=True)  # the browser logs what the policy forbids
    ask(page, HOSTILE)
    assert page.title() == "Quire"
    assert page.locator("main img, main script").count() == 0
    assert HOSTILE in page.inner_text("article[aria-label=user]")
    assert page.inner_text("article[aria-label=assistant]").count("onerror") == 2
    assert (
        page.evaluate(
            "() => { try { document.body.innerHTML = '<b>x</b>'; return ''; } catch (error) { return error.name; } }"
        )
        == "TypeError"
    )


def test_stop_ends_an_answer_and_its_request(scripted: RunningServer, open_page: Any) -> None:
    engine: Any = scripted.engine
    engine.endless, engine.delay, engine.max_model_len = True, 0.05, 2**20
    page = open_page(scripted)
    set_parameters(page, max_tokens=100_000)
    ask(page, "Go on", wait=False)
    until(page, lambda: len("".join(answers(page))) > 10)
    page.click("#stop")
    page.wait_for_selector("#send:not([disabled])")
    assert "stopped" in page.inner_text("article[aria-label=assistant] .facts")
    ask(page, "Go on", wait=False)
    until(page, lambda: len(answers(page)) == 2 and len(answers(page)[-1]) > 10)
    page.press("#prompt", "Escape")
    page.wait_for_selector("#send:not([disabled])")
    assert "stopped" in page.locator("article[aria-label=assistant] .facts").last.inner_text()
    until(page, lambda: engine.num_running == 0)
    assert engine.num_closed_early == 2


def test_edits_retries_and_answers_are_branches(scripted: RunningServer, open_page: Any) -> None:
    page = open_page(scripted)
    ask(page, "First")
    page.click("text=Retry")
    page.wait_for_selector("text=2/2")
    page.click("article[aria-label=user] >> text=Edit")
    ask(page, "Second")
    assert "Second" in page.inner_text("article[aria-label=user]")
    page.click("article[aria-label=user] >> [aria-label='Branch before']")
    assert "First" in page.inner_text("article[aria-label=user]")
    set_parameters(page, n=3)
    ask(page, "More")
    assert len(answers(page)) == 4
    page.locator("text=Continue from this").last.click()
    ask(page, "And more")
    sent = scripted.engine.calls[-1]  # type: ignore[attr-defined]
    assert sent.params.n == 3
    assert page.locator(".forks .fork").count() >= 3
    assert "stored once for 3 answers" in page.inner_text(".forks")


def test_parameters_reach_the_engine_and_wrong_ones_are_named(scripted: RunningServer, open_page: Any) -> None:
    page = open_page(scripted)
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    set_parameters(page, temperature=0.5, top_p=0.9, max_tokens=7, seed=3, stop="x\ny", schema=json.dumps(schema))
    ask(page, "Hello")
    params = scripted.engine.calls[-1].params  # type: ignore[attr-defined]
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.5, 0.9, 7, 3)
    assert list(params.stop) == ["x", "y"]
    assert params.structured_outputs is not None
    for values, words in (({"schema": "{"}, "JSON schema is not JSON"), ({"schema": "", "n": 99}, "Answers (n) is 99")):
        set_parameters(page, **values)
        ask(page, "Hello", wait=False)
        until(page, lambda words=words: words in page.inner_text(".problem"))


def test_only_controls_that_the_model_takes_are_shown(open_page: Any) -> None:
    engine = ScriptedEngine()
    with RunningServer(engine) as server:
        page = open_page(server)
        page.wait_for_selector("#model option", state="attached")
        page.click("summary:has-text('Parameters')")
        page.wait_for_selector("[name=tools]")
        assert not page.is_visible(".attach")
        engine.images = SimpleNamespace(max_images=1)  # type: ignore[assignment]  # the page asks whether there is one
        engine.chat_template = None
        page.reload()
        page.wait_for_selector(".attach")
        page.click("summary:has-text('Parameters')")
        assert not page.is_visible("[name=tools]")
        assert page.is_visible("[name=schema]")


def test_calls_of_tools_are_shown_and_take_a_result(scripted: RunningServer, open_page: Any) -> None:
    engine: Any = scripted.engine
    engine.answer = '{"name": "weather", "arguments": {"city": "Rome"}}'
    page = open_page(scripted)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    set_parameters(page, tools=json.dumps([tool]))
    ask(page, "How is it in Rome?")
    assert "calls weather(" in page.inner_text(".tool")
    assert page.get_attribute("#prompt", "placeholder") == "Result of weather"
    engine.answer = "It is sunny."
    ask(page, "sun")
    assert answers(page)[-1] == "It is sunny."
    assert "sun" in page.inner_text("article[aria-label=tool]")


def test_conversations_are_exported_and_imported(scripted: RunningServer, open_page: Any, tmp_path: Path) -> None:
    page = open_page(scripted)
    ask(page, "Keep this")
    with page.expect_download() as download:
        page.click("text=Export")
    kept = tmp_path / "kept.json"
    download.value.save_as(kept)
    other = open_page(scripted)
    other.set_input_files("aside input[type=file]", kept)
    other.wait_for_selector("article")
    assert answers(other) == [ANSWER]
    for text, words in (
        ("{", "not JSON"),
        ("{}", "no list"),
        ('{"conversations": [{"nodes": [{}]}]}', "message 0 lacks"),
    ):
        kept.write_text(text)
        other.set_input_files("aside input[type=file]", kept)
        until(other, lambda words=words: words in other.inner_text(".problem"))


def test_a_server_with_a_key_asks_for_it(open_page: Any) -> None:
    with RunningServer(ScriptedEngine(), ServerSettings(port=0, api_key=("secret",))) as server:
        page = open_page(server, may_log=True)
        page.wait_for_selector("#key", state="visible")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        until(page, lambda: "does not know this API key" in page.inner_text("#banner"))
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.wait_for_selector("#model option", state="attached")
        ask(page, "Hello")
        assert answers(page) == [ANSWER]
        page.goto(f"{server.url}/#memory")
        until(page, lambda: "blocks of" in page.inner_text("#summary"))


def test_the_lessons_play_with_the_keyboard(scripted: RunningServer, open_page: Any) -> None:
    page = open_page(scripted, "learn")
    page.click("#scene2")
    page.keyboard.press("ArrowRight")
    assert "copied first" in page.inner_text("#words")
    assert page.locator(".slots .copied").count() == 2
    picture(page, "page-learn.png")
    page.click("#scene3")
    words = []
    while page.is_enabled("#step"):
        page.click("#step")
        words.append(page.inner_text("#words"))
    assert any("gives back all its blocks" in text for text in words)
    assert any("comes back" in text for text in words)


def test_the_page_fits_a_phone_and_names_its_controls(scripted: RunningServer, open_page: Any) -> None:
    page = open_page(scripted, color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 640})
    for view in ("chat", "memory", "learn"):
        page.goto(f"{scripted.url}/#{view}")
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, view
        unnamed = page.evaluate(
            "() => [...document.querySelectorAll('button, input, textarea, select, canvas, svg')]"
            ".filter((each) => each.checkVisibility())"
            ".filter((each) => !(each.textContent.trim() || each.ariaLabel || each.labels?.length))"
            ".map((each) => each.outerHTML)"
        )
        assert unnamed == []
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(230, 227, 219)"


def test_an_edit_is_seen_and_can_be_given_up(scripted: RunningServer, open_page: Any) -> None:
    page = open_page(scripted)
    until(page, lambda: "Enter sends it" in page.inner_text(".log"))
    ask(page, "First")
    assert page.locator(".welcome").count() == 0
    page.click("article[aria-label=user] >> text=Edit")
    assert page.is_visible(".editing")
    assert page.input_value("#prompt") == "First"
    page.press("#prompt", "Escape")
    assert not page.is_visible(".editing")
    ask(page, "Second")
    assert len(answers(page)) == 2, "no branch"
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.click(".conversations [aria-label^=Delete]")
    assert len(answers(page)) == 2
    page.once("dialog", lambda dialog: dialog.accept())
    page.click(".conversations [aria-label^=Delete]")
    assert answers(page) == []


@pytest.mark.skipif(not AXE.is_file(), reason="make test-page fetches axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(scripted: RunningServer, open_page: Any, scheme: str) -> None:
    """axe-core's rules of WCAG and of good practice, on every view, wide and narrow."""
    page = open_page(scripted, color_scheme=scheme)
    set_parameters(page, n=2)
    ask(page, "Hello")
    for width in (1100, 360):
        page.set_viewport_size({"width": width, "height": 640})
        for view, ready in (("chat", "article"), ("memory", "figure"), ("learn", ".slots")):
            page.goto(f"{scripted.url}/#{view}")
            page.wait_for_selector(ready)
            page.evaluate(AXE.read_text())
            found = page.evaluate("async () => (await axe.run({resultTypes: ['violations']})).violations")
            assert [(rule["help"], [node["html"] for node in rule["nodes"]]) for rule in found] == [], (view, width)


@contextmanager
def running_request(server: RunningServer, **fields: Any) -> Iterator[None]:
    """A streamed completion that is aborted at the end."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"prompt": f"{PROMPT} " * 3, "stream": True, "ignore_eos": True, "max_tokens": 400, **fields}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    response.read(1)
    try:
        yield
    finally:
        response.close()
        connection.close()


def test_the_map_shows_the_sharing_of_four_answers(llm: RunningServer, open_page: Any) -> None:
    page = open_page(llm, "memory")
    until(page, lambda: "300 blocks of 16 tokens" in page.inner_text("#summary"))
    with running_request(llm, n=4):
        until(page, lambda: int(page.get_attribute("#summary", "data-shared")) > 0)
        page.click("tbody button")
        until(page, lambda: "Block table of sample 3" in page.inner_text(".detail"))
        assert "yonder" in page.inner_text(".detail .tokens")
        picture(page, "page-memory.png", height=920)
        page.locator(".detail .table button").first.click()
        until(page, lambda: page.inner_text(".detail h2").startswith("Block"))
        assert page.locator(".detail li").count() == 4
        page.focus("canvas")
        page.keyboard.press("ArrowRight")
        assert "Block 1:" in str(page.get_attribute("canvas", "aria-label"))
    until(page, lambda: page.get_attribute("#summary", "data-shared") == "0")
    assert page.locator("figure path").count() >= 9


def test_four_answers_of_a_model_stand_side_by_side(llm: RunningServer, open_page: Any) -> None:
    page = open_page(llm)
    set_parameters(page, n=4, max_tokens=40, temperature=0.9, seed=1)
    ask(page, PROMPT)
    assert len(set(answers(page))) == 4
    page.locator("text=Continue from this").last.click()
    set_parameters(page, n=1)
    ask(page, "And then?")
    facts = page.locator("article[aria-label=assistant] .facts").all_inner_texts()
    assert "0 of" not in facts[-1], "the branch begins with blocks of the answer before"
    assert "shared blocks" in facts[-1]
    picture(page, "page-chat.png", height=820)


def test_a_killed_engine_is_a_pause(llm: RunningServer, open_page: Any) -> None:
    engine = llm.engine
    assert isinstance(engine, AsyncLLM)
    page = open_page(llm, may_log=True)
    memory = page.context.new_page()
    memory.goto(f"{llm.url}/#memory")
    set_parameters(page, n=1, max_tokens=400, temperature=0, stop="")
    page.evaluate("() => 0")
    ask(page, "Tell me of the sun.", wait=False)
    until(page, lambda: len("".join(answers(page))) > 0)
    os.kill(engine.engine_pid, signal.SIGKILL)
    until(memory, lambda: "restarting" in memory.inner_text("#banner"))
    page.wait_for_selector("#send:not([disabled])")
    assert page.inner_text(".problem") == ""
    assert "failed" not in page.inner_text("article[aria-label=assistant] .facts")
    (text,) = answers(page)
    until(memory, lambda: not memory.is_visible("#banner"))
    page.click("article[aria-label=assistant] >> text=Retry")
    page.wait_for_selector("#send:not([disabled])")
    page.wait_for_selector("text=2/2")
    assert answers(page) == [text], "the same tokens as without a death"
    until(memory, lambda: "300 blocks" in memory.inner_text("#summary"))
