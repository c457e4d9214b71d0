"""Two real servers behind the router; one of them is killed under streams."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from openai import OpenAI

from tests.router.processes import Process, start_all

REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("greedy", {"temperature": 0.0}),
    ("seeded", {"temperature": 1.0, "seed": 7}),
    ("several", {"temperature": 1.0, "seed": 11, "n": 2}),
    ("stop", {"temperature": 1.0, "seed": 3, "stop": ["zqx"]}),
    ("penalised", {"temperature": 0.7, "seed": 5, "frequency_penalty": 0.3}),
    ("logprobs", {"temperature": 0.0, "logprobs": True, "top_logprobs": 2}),
]


def test_streams_of_a_killed_server_go_on_with_the_same_tokens() -> None:
    servers = [Process("serve", "--threads", "1", "--max-model-len", "1024") for _ in range(2)]
    with servers[0], servers[1]:
        start_all(servers)
        router = Process("router", "--backends", ",".join(server.url for server in servers))
        with router:
            start_all([router])
            direct, routed = (
                OpenAI(base_url=f"{each.url}/v1", api_key="x", max_retries=0) for each in (servers[1], router)
            )
            model = direct.models.list().data[0].id
            wanted = [answer(direct, model, name, options) for name, options in REQUESTS]
            begun = threading.Semaphore(0)
            with ThreadPoolExecutor(len(REQUESTS)) as pool:
                asked = [pool.submit(answer, routed, model, name, options, begun) for name, options in REQUESTS]
                for _ in REQUESTS:
                    assert begun.acquire(timeout=30)
                servers[0].kill()
                got = [each.result(60) for each in asked]
            for (name, _), one, other in zip(REQUESTS, got, wanted, strict=True):
                assert one == other, name
            state = httpx.get(f"{router.url}/router").json()
            assert state["resumed_streams"] >= 1
            assert state["cut_streams"] == 0
            assert [each["is_up"] for each in state["replicas"]] == [False, True]
            check_that_leaving_frees_the_engine(servers[1], router)
            check_that_bad_requests_get_the_servers_answer(servers[1], router)
            assert router.stop() == 0


BAD_BODIES: list[bytes] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"prompt": "\xff"}',
    b"[" * 5_000,
    b'{"prompt": 5}',
    b'{"prompt": []}',
    b'{"prompt": [-1]}',
    b'{"prompt": "a", "model": "another"}',
    b'{"prompt": "a", "n": 1000}',
    b'{"prompt": "a", "max_tokens": 1e9}',
    b'{"prompt": "a", "stream": "yes"}',
    b'{"prompt": "a", "stream": true, "temperature": -1}',
    b'{"prompt": "a", "cache_salt": 5}',
    b'{"prompt": "a", "prompt_cache_key": {"a": [1]}}',
]


def check_that_bad_requests_get_the_servers_answer(server: Process, router: Process) -> None:
    """The router adds no error of its own and no 5xx, whatever a client sends."""
    asked = [("POST", path, body) for path in ("/v1/completions", "/v1/chat/completions") for body in BAD_BODIES]
    asked += [(method, "/v1/completions", b"") for method in ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE")]
    paths = ("/v1/files/none", "/v1/responses/none", "/v1/responses/", "/nothing", "/v1/../v1/models", "/%ff%00?a=%zz")
    asked += [("GET", path, b"") for path in paths]
    headers = {"content-type": "application/json", "x-quire-stream": "forged", "x-quire-prompt": "blocks"}
    with httpx.Client(timeout=30) as client:
        for method, path, body in asked:
            direct = client.request(method, server.url + path, content=body)
            routed = client.request(method, router.url + path, content=body, headers=headers)
            assert routed.status_code == direct.status_code, (method, path, body[:60], routed.text[:300])
            assert routed.status_code < 500 or routed.status_code == 501
        assert client.get(f"{router.url}/health").json()["servers"] == 1


def check_that_leaving_frees_the_engine(server: Process, router: Process) -> None:
    """Clients that leave the router in the middle of streams and whole answers leave no request and no used block."""
    body = {"prompt": "To be, or not to be", "max_tokens": 1000, "ignore_eos": True, "temperature": 0}
    for stream in (True, False):
        connections = [open_request(router.port, {**body, "stream": stream}) for _ in range(8)]
        await_figures(server.url, lambda running, usage: running > 0 and usage > 0)
        for each in connections:
            each.close()
        await_figures(server.url, lambda running, usage: running == 0 and usage == 0)
    state = httpx.get(f"{router.url}/router").json()
    assert (state["replicas"][1]["num_requests"], state["cut_streams"]) == (0, 0)


def answer(
    client: OpenAI, model: str, name: str, options: dict[str, Any], begun: threading.Semaphore | None = None
) -> list[Any]:
    """Per choice: text, tokens, finish reason, number of logprobs; then the usage."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"Tell me about the {name} sea."}],
        max_tokens=400,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "return_token_ids": True},
        **options,
    )
    choices: dict[int, list[Any]] = {}
    ids = set()
    usage = None
    for chunk in stream:
        ids.add(chunk.id)
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts = choices.setdefault(choice.index, ["", [], None, 0])
            parts[0] += choice.delta.content or ""
            parts[1] += (choice.model_extra or {}).get("token_ids") or []
            parts[2] = choice.finish_reason or parts[2]
            parts[3] += len(choice.logprobs.content or ()) if choice.logprobs else 0
            if begun is not None and len(parts[1]) >= 20:
                begun.release()
                begun = None
                time.sleep(0.05)
    assert len(ids) == 1
    assert usage is not None
    return [[choices[index] for index in sorted(choices)], usage.prompt_tokens, usage.completion_tokens]


def open_request(port: int, body: dict[str, Any]) -> socket.socket:
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(content), content)
    )
    return connection


def await_figures(url: str, is_right: Callable[[float, float], bool], seconds: float = 30.0) -> None:
    """Wait until the running requests and the share of the KV cache in use are right."""
    deadline = time.monotonic() + seconds
    figures = (-1.0, -1.0)
    while time.monotonic() < deadline:
        text = httpx.get(f"{url}/metrics").text
        figures = (metric(text, "num_requests_running"), metric(text, "kv_cache_usage_perc"))
        if is_right(*figures):
            return
        time.sleep(0.02)
    raise AssertionError(figures)


def metric(text: str, name: str) -> float:
    found = re.search(rf"^quire:{name}(?:\{{[^}}]*\}})? (\S+)", text, re.MULTILINE)
    assert found, name
    return float(found[1])
