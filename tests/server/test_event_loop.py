"""No request within the limits keeps the event loop busy: the largest allowed value of every field is sent."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from quire.server.limits import MAX_ESCAPES, MAX_LISTS, MAX_STRINGS, MAX_VALUES
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine, bundled_tokenizer

LIMIT = 0.1
"""Seconds of CPU time in one callback, for a machine whose caches belong to its neighbours; some 0.02 alone."""
WORDS = [f"word{number}" for number in range(256)]
MESSAGE = {"role": "user", "content": "x"}
COMPLETION: dict[str, Any] = {"prompt": "x", "max_tokens": 1}
CHAT: dict[str, Any] = {"messages": [MESSAGE], "max_tokens": 1}
DEEP = '{"a":' * 900 + "1" + "}" * 900

LARGEST: dict[str, tuple[str, dict[str, Any] | bytes]] = {
    "a prompt of 3.9 million characters": ("/v1/completions", {**COMPLETION, "prompt": "a" * 3_900_000}),
    "the same, truncated": (
        "/v1/completions",
        {**COMPLETION, "prompt": "a" * 1_000_000, "truncate_prompt_tokens": 9},
    ),
    "a prompt of escapes": ("/v1/completions", b'{"prompt":"' + rb"\u0041" * (MAX_ESCAPES - 9) + b'"}'),
    "a prompt of commas and brackets": ("/v1/completions", {**COMPLETION, "prompt": ",[" * 1_900_000}),
    "a number of a million digits": ("/v1/completions", b'{"prompt":"x","seed":' + b"1" * 10**6 + b"}"),
    "token ids": ("/v1/completions", {**COMPLETION, "prompt": [1] * (MAX_VALUES - 9)}),
    "lists of token ids": ("/v1/completions", {**COMPLETION, "prompt": [[1]] * (MAX_LISTS - 9)}),
    "many prompts and bad words": ("/v1/completions", {**COMPLETION, "prompt": ["x"] * 1024, "bad_words": WORDS}),
    "stop strings": ("/v1/completions", {**COMPLETION, "stop": ["x" * 1000 + word for word in WORDS[:64]]}),
    "token lists": (
        "/v1/completions",
        {**COMPLETION, "prompt": ["x"] * 64, "allowed_token_ids": list(range(250)) * 16, "stop_token_ids": [1] * 4096},
    ),
    "logit_bias": ("/v1/completions", {**COMPLETION, "logit_bias": {str(number): 1 for number in range(MAX_STRINGS)}}),
    "unknown fields": ("/v1/completions", {**COMPLETION, "x": [1] * (MAX_VALUES - 9)}),
    "messages": ("/v1/chat/completions", {**CHAT, "messages": [MESSAGE] * (MAX_STRINGS // 4 - 9)}),
    "empty messages": ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user"}] * (MAX_STRINGS // 2 - 9)}),
    "a long message": ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "a" * 3_900_000}]}),
    "a schema": ("/v1/completions", {**COMPLETION, "guided_json": {"enum": ["x"] * (MAX_STRINGS - 99)}}),
    "a deep schema": ("/v1/completions", {**COMPLETION, "guided_json": DEEP}),
    "tokenize": ("/tokenize", {"prompt": "a" * 999_999, "return_token_strs": True}),
    "detokenize": ("/detokenize", {"tokens": [5, 6, 7, 8] * (MAX_VALUES // 4 - 1)}),
    "commas": ("/v1/completions", {**COMPLETION, "prompt": [1] * 1_000_000}),
    "lists": ("/v1/completions", {**COMPLETION, "prompt": [[1]] * 1_000_000}),
    "escapes": ("/v1/completions", b'{"prompt":"' + rb"\u0041" * 1_300_000 + b'"}'),
    "texts": ("/v1/completions", {**COMPLETION, "prompt": [""] * 1_000_000}),
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer(ScriptedEngine()) as running:
        yield running


@pytest.fixture
def longest(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The CPU time of every callback of the server's event loop."""
    seen: list[float] = [0.0]
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        begin = time.thread_time()
        run(handle)
        seen.append(time.thread_time() - begin)

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    return seen


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_requests_leave_the_loop_free(server: RunningServer, longest: list[float], name: str) -> None:
    path, body = LARGEST[name]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    for _ in range(3):  # a neighbour on the same core lengthens a callback now and then
        longest[:] = [0.0]
        assert server.send("POST", path, data)[0].status in (200, 400)
        if max(longest) < LIMIT:
            return
    raise AssertionError(f"a callback took {max(longest):.3f} s")


def test_other_threads_run_while_texts_are_tokenised_and_decoded() -> None:
    """The library's calls for one text would hold the interpreter's lock for their whole time."""
    tokenizer = bundled_tokenizer()
    ids = [5, 6, 7] * 100_000
    for work in (lambda: tokenizer.encode("a" * 300_000), lambda: tokenizer.decode(ids)):
        # On a busy machine the system, too, stops this thread. It does not do so each time.
        assert min(longest_stop(work) for _ in range(5)) < 0.5


def longest_stop(work: Callable[[], object]) -> float:
    """The longest time in which another thread's work let this one not run, as a share of the work's time."""
    thread = threading.Thread(target=work)
    begin = last = time.perf_counter()
    longest = 0.0
    thread.start()
    while thread.is_alive():
        time.sleep(0)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest / (last - begin)
