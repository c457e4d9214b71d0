"""The deployments, in one process and on Ray itself. `make test-cluster` runs these."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.router.processes import Process

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("QUIRE_TEST_CLUSTER"), reason="make test-cluster"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]

PROMPT = {"prompt": "To be, or not to be", "max_tokens": 300, "temperature": 0, "stream": True, "ignore_eos": True}


def test_deployments_find_each_other_and_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica announces itself, answers through the ingress, and leaves without cutting a stream."""
    from ray import serve

    from quire.cluster.options import ClusterOptions
    from quire.cluster.replica import ReplicaDeployment
    from quire.cluster.router import INGRESS, RouterDeployment

    drain = ReplicaDeployment.__del__
    monkeypatch.delattr(ReplicaDeployment, "__del__")  # Serve awaits it; Python would not
    options = ClusterOptions.of({"replicas": 2, "threads": 1, "max_model_len": 512, "shutdown_timeout": 0.0})

    async def made(deployment: Any, *arguments: Any) -> Any:
        instance = deployment.__new__(deployment)
        await instance.__init__(*arguments)
        return instance

    async def run() -> None:
        router = await made(RouterDeployment, options, None)
        announce = SimpleNamespace(remote=router.announce)
        monkeypatch.setattr(serve, "get_deployment_handle", lambda *_: SimpleNamespace(announce=announce))
        replicas = await asyncio.gather(*(made(ReplicaDeployment, options, "quire") for _ in range(2)))
        transport = httpx.ASGITransport(app=INGRESS)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            while (await client.get("/health")).json().get("servers") != 2:
                await asyncio.sleep(0.05)
            for replica in replicas:
                await replica.check_health()
                assert replica.record_autoscaling_stats().keys() == {"queue_seconds", "kv_share"}
            whole = (await client.post("/v1/completions", json=PROMPT)).text
            asking = [asyncio.create_task(client.post("/v1/completions", json=PROMPT)) for _ in range(4)]
            await asyncio.sleep(0.2)
            await drain(replicas[0])  # with no time to drain: its streams move
            answers = [(await each).text for each in asking]
            assert {texts(answer) for answer in answers} == {texts(whole)}
            assert INGRESS.app is not None
            assert INGRESS.app.proxy.counts.cut_streams == 0
            await drain(replicas[1])
            with pytest.raises(RuntimeError, match="is dead"):
                await replicas[1].check_health()
        router._watching.cancel()
        await router._backends.client.aclose()

    asyncio.run(asyncio.wait_for(run(), 240))


def texts(stream: str) -> str:
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def test_a_killed_replica_on_ray_cuts_no_stream() -> None:
    cluster = Process("cluster", "serve", "--replicas", "2", "--num-cpus", "0.5", "--threads", "1")
    with cluster:
        cluster.start(port=18_431)
        cluster.await_ready(600)
        url = "http://127.0.0.1:18431"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=5).json().get("servers") == 2:
                    break
            time.sleep(0.5)
        whole = texts(httpx.post(f"{url}/v1/completions", json=PROMPT, timeout=60).text)
        with httpx.stream("POST", f"{url}/v1/completions", json=PROMPT, timeout=120) as response:
            served = int(response.headers["x-quire-replica"].rpartition(":")[2])
            parts = []
            for part in response.iter_text():
                parts.append(part)
                if len(parts) == 5:
                    os.kill(listener_of(served), signal.SIGKILL)
        assert texts("".join(parts)) == whole
        assert cluster.stop() == 0


def listener_of(port: int) -> int:
    """The process that listens on a port of this machine."""
    found = subprocess.run(["ss", "-ltnpH", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout
    return int(found.partition("pid=")[2].partition(",")[0])


def test_a_dead_head_node_is_named() -> None:
    command = Process("cluster", "serve", "--address", "127.0.0.1:9")
    with command:
        command.start(port=18_432)
        assert command._process.wait(300) == 2
        assert "no Ray cluster answers at 127.0.0.1:9" in "".join(command.lines)
