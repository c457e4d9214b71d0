"""Two real servers behind the router; one of them is killed under streams."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import OpenAI, OpenAIError

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
            kill_a_router(router, servers[1], routed, model, dict(zip(dict(REQUESTS), wanted, strict=True)))


def kill_a_router(router: Process, server: Process, client: OpenAI, model: str, wanted: dict[str, list[Any]]) -> None:
    """Its clients ask again, and get their answers; the engine drops what the dead router had sent."""
    names = list(wanted)[:3]
    num_before = metric(server, "generation_tokens_total")
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(len(names)) as pool:
        asked = [pool.submit(answer, client, model, name, dict(REQUESTS)[name], begun) for name in names]
        for _ in names:
            assert begun.acquire(timeout=60)
        port = router.port
        router.kill()
        for each in asked:
            with pytest.raises((OpenAIError, httpx.HTTPError)):
                each.result(60)
        await_idle(server)
        num_wanted = sum(len(choice[1]) for name in names for choice in wanted[name][0])
        assert metric(server, "generation_tokens_total") - num_before < num_wanted / 2
        with Process("router", "--backends", server.url) as second:
            second.start(port)
            second.await_ready()
            again = [pool.submit(answer, client, model, name, dict(REQUESTS)[name]) for name in names]
            assert [each.result(120) for each in again] == [wanted[name] for name in names]
            await_idle(server)
            assert second.stop() == 0


def await_idle(server: Process) -> None:
    deadline = time.monotonic() + 60
    while metric(server, "num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def metric(server: Process, name: str) -> int:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(rf"^quire:{name}(?:\{{.*?\}})? (\d+)", text, re.MULTILINE)
    assert found is not None, name
    return int(found[1])


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
