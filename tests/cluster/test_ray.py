"""The deployments, in one process and on Ray itself. `make test-cluster` runs these."""

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from quire.cluster.scaling import EngineNumbers
from quire.errors import ConfigError
from tests.cluster.test_application import serve_config
from tests.router.processes import Process, free_port

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
        monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(app_name="quire"))
        replicas = await asyncio.gather(*(made(ReplicaDeployment, options) for _ in range(2)))
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
    gc.collect()  # the replicas, while they have no `__del__`


def texts(stream: str) -> str:
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def test_serve_loads_the_config_for_kuberay(tmp_path: Path) -> None:
    """As the head node does: config, import path, options."""
    from ray._common.utils import import_attr
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema.model_validate(serve_config()).applications
    (tmp_path / "keys").write_text("sk-a-key-of-the-secret\n")
    args = {**application.args, "api_key_file": str(tmp_path / "keys")}
    router = build(import_attr(application.import_path), args)._bound_deployment
    _, replicas = router.init_args
    scale = replicas._bound_deployment._deployment_config.autoscaling_config
    assert (scale.min_replicas, scale.max_replicas, scale.policy.get_policy()) == (2, 4, EngineNumbers)
    with pytest.raises(ConfigError, match="replicas is 0"):
        build(import_attr(application.import_path), {**args, "replicas": 0})


def test_replicas_on_ray(tmp_path: Path) -> None:
    """One cluster, as it takes a minute to start: streams while replicas are killed, updated, added and removed."""
    options = ("--num-cpus", "0.5", "--threads", "1", "--upscale-delay", "1", "--downscale-delay", "20")
    cluster = Process("cluster", "serve", "--replicas", "2", *options)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with cluster:
        cluster.start(port=port)
        cluster.await_ready(1200)
        await_servers(url, {2})
        with httpx.Client(timeout=900) as client:
            whole = ask(url, client)
        kill_under_a_stream(url, whole)
        await_servers(url, {2})
        small = ("--max-replicas", "2", "--num-blocks", "400")
        update = Process("cluster", "serve", "--replicas", "1", *small, *options, "--address", "auto")
        with update:
            with asking(url, whole) as num_right:  # a rolling update: other options, the same address
                update.start(port=port)
                update.await_ready(1200)
                assert f"listening on {url}" in "".join(update.lines)
                await_servers(url, {1})
                assert num_right() > 0
                with asking(url, whole, clients=40):  # 20 blocks each: more than one replica holds
                    await_servers(url, {2})
                await_servers(url, {1})
            assert update.stop() == 0
        assert cluster.stop() == 0


def ask(url: str, client: httpx.Client) -> str:
    return texts(client.post(f"{url}/v1/completions", json=PROMPT).text)


@contextlib.contextmanager
def asking(url: str, whole: str, clients: int = 1) -> Iterator[Callable[[], int]]:
    """Ask all the time; every answer must be `whole`."""
    answers: list[str] = []
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            answers.append(ask(url, client))

    # One client: each new one would read all certificates first, and the requests come one by one.
    with httpx.Client(timeout=900) as client, ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(work) for _ in range(clients)]
        try:
            yield lambda: len(answers)
        finally:
            stopped.set()
        for each in asked:
            each.result()
    assert set(answers) == {whole}


def await_servers(url: str, wanted: set[int], seconds: float = 900.0) -> None:
    deadline, last = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            last = httpx.get(f"{url}/health", timeout=5).json().get("servers")
            if last in wanted:
                return
        time.sleep(0.2)
    raise AssertionError(f"{last} replicas instead of {wanted}")


def kill_under_a_stream(url: str, whole: str) -> None:
    """Its stream goes on at the other replica with the same text."""
    with httpx.stream("POST", f"{url}/v1/completions", json=PROMPT, timeout=600) as response:
        served = int(response.headers["x-quire-replica"].rpartition(":")[2])
        parts = []
        for part in response.iter_text():
            parts.append(part)
            if len(parts) == 5:
                os.kill(listener_of(served), signal.SIGKILL)
    assert texts("".join(parts)) == whole


def listener_of(port: int) -> int:
    """The process that listens on a port of this machine."""
    found = subprocess.run(["ss", "-ltnpH", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout
    return int(found.partition("pid=")[2].partition(",")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--address", "127.0.0.1:9"), "no Ray cluster answers at 127.0.0.1:9: connection refused"),
        (("--address", "auto"), "no Ray cluster answers at 127.0.0.1:9: connection refused"),  # the last one died
        (("--address", "{taken}"), "no Ray cluster answers at {taken}: "),  # something else listens there
        ((), "cannot listen on {taken}: address already in use"),
        (("no/such/model",), "the replicas did not start: no/such/model is not a folder; "),
    ],
)
def test_what_cannot_start_says_why(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:9")
    if "auto" in arguments:
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = f"127.0.0.1:{server.getsockname()[1]}"
        port = free_port() if arguments else int(server.getsockname()[1])
        command = Process("cluster", "serve", *(each.format(taken=taken) for each in arguments))
        with command:
            command.start(port=port)
            status = command._process.wait(400)
        assert message.format(taken=taken) in "".join(command.lines)
        assert status == (1 if "replicas" in message else 2)
        assert "Traceback" not in "".join(command.lines)
