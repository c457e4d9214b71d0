"""Processes of a cluster on this machine: servers, each in a network namespace where there can be some, and a router.

`StalledStreams` says what a cluster was doing when a stream got nothing for a while.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.fragile_engine import COMMAND


class Member:
    """A process of `quire` at a fixed address, which can be killed and started again."""

    def __init__(self, *arguments: str, url: str, log: Path, namespace: str = "", source: str = "") -> None:
        """What it writes is added to the file `log`."""
        self.url = url
        self.log = log
        self.namespace = namespace
        enter = ["ip", "netns", "exec", namespace] if namespace else []
        self._command = [*enter, sys.executable, *COMMAND, *arguments]
        paths = [*([source] if source else []), str(Path(__file__).parents[1])]
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, env=self._environment, stderr=log)

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill it as a machine that fails would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def is_ready(self, client: httpx.AsyncClient) -> bool:
        with suppress(httpx.HTTPError):
            return (await client.get(f"{self.url}/health/ready", timeout=2)).status_code == 200
        return False

    def __enter__(self) -> "Member":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@dataclass
class Cluster:
    """Servers behind one router."""

    servers: list[Member]
    router: Member
    client: httpx.AsyncClient

    async def await_servers(self, seconds: float = 180.0) -> None:
        """Wait until the router takes requests for all servers. Raises `TimeoutError`."""
        async with asyncio.timeout(seconds):
            while True:
                with suppress(httpx.HTTPError, json.JSONDecodeError):
                    state = (await self.client.get(f"{self.router.url}/health", timeout=2)).json()
                    if state["servers"] == len(self.servers):
                        return
                await asyncio.sleep(0.1)

    async def num_running(self) -> int:
        """Requests in the engines of all servers that answer."""
        total = 0
        for server in self.servers:
            with suppress(httpx.HTTPError):
                text = (await self.client.get(f"{server.url}/metrics", timeout=2)).text
                found = re.search(r"^quire:num_requests_running(?:\{[^}]*\})? (\d+)", text, re.MULTILINE)
                total += int(found[1]) if found else 0
        return total


def make_namespaces(stack: ExitStack, count: int) -> list[tuple[str, str]]:
    """(Name, address) of network namespaces, each joined by a link of its own; [] where there can be none."""
    made = []
    for number in range(count):
        name, network = f"quire{number}", f"10.98.{number}"
        inside = ["ip", "-n", name]
        commands = (
            ["ip", "netns", "add", name],
            ["ip", "link", "add", f"{name}h", "type", "veth", "peer", "name", "eth0", "netns", name],
            ["ip", "address", "add", f"{network}.1/30", "dev", f"{name}h"],
            ["ip", "link", "set", f"{name}h", "up"],
            [*inside, "address", "add", f"{network}.2/30", "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
            [*inside, "link", "set", "lo", "up"],
        )
        stack.callback(subprocess.run, ["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
        for command in commands:
            if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
                return []
        made.append((name, f"{network}.2"))
    return made


@dataclass
class OpenStream:
    """An answer that a client waits for."""

    name: str
    last_event: float = field(default_factory=time.monotonic)
    replica: str = "none yet"
    """The server that began the answer."""
    answer_id: str = ""
    num_tokens: int = 0


class StalledStreams:
    """Prints what the cluster says whenever a stream has had no event for `seconds`."""

    def __init__(self, cluster: Cluster, seconds: float) -> None:
        self._cluster = cluster
        self._seconds = seconds
        self.streams: dict[int, OpenStream] = {}

    async def watch(self) -> None:
        """Look for ever."""
        reported = 0.0
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            stalled = [each for each in self.streams.values() if now - each.last_event > self._seconds]
            if stalled and now - reported > self._seconds:
                reported = now
                await self._report(stalled, now)

    async def _report(self, stalled: list[OpenStream], now: float) -> None:
        for each in stalled:
            print(
                f"STALLED {now - each.last_event:.0f} s: {each.name}, begun by {each.replica}, id {each.answer_id!r}, "
                f"{each.num_tokens} tokens",
                flush=True,
            )
        print(f"  router: {await self._get(self._cluster.router.url, '/router')}", flush=True)
        for server in self._cluster.servers:
            ready = await self._get(server.url, "/health/ready")
            metrics = await self._get(server.url, "/metrics")
            counts = re.findall(r"^quire:(num_requests_\w+|engine_\w+)(?:\{[^}]*\})? (\S+)", metrics, re.MULTILINE)
            print(f"  {server.url}: {ready}; {dict(counts)}", flush=True)
            print("".join(f"    {line}\n" for line in server.log.read_text().splitlines()[-6:]), end="", flush=True)

    async def _get(self, url: str, path: str) -> str:
        try:
            answer = await self._cluster.client.get(url + path, timeout=2)
        except httpx.HTTPError as error:
            return repr(error)
        return f"{answer.status_code} {answer.text}"
