"""Cluster chaos: streams through `quire router` while servers and the router are killed, stopped, and cut off.

    python -m benchmarks.cluster_chaos --minutes 10 --servers 3 --streams 12     # as root: each server in a namespace

Every kind of request is answered once without faults. Then streams repeat the kinds, faults come one after the other,
and every answer must equal the first. A client asks again only if the router was killed meanwhile. Sometimes a client
sends a request that engines die of: one server finds that out, and the others may not lose an engine to it.

With network namespaces (root, and `ip netns`) a server is also cut off for ten seconds: its link is set down, so no
packet tells anybody that it is gone. `--other DIR` starts the last server from the sources of another version.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.cluster_members import Cluster, Member, OpenStream, StalledStreams, make_namespaces
from benchmarks.fragile_engine import DEADLY

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 7},
    "several": {"temperature": 1.0, "seed": 11, "n": 2, "max_tokens": 100},
    "stop": {"temperature": 1.0, "seed": 3, "stop": ["zqx"]},
    "penalised": {"temperature": 0.7, "seed": 5, "frequency_penalty": 0.3},
    "whole": {"temperature": 0.0, "stream": False, "max_tokens": 60},
}
PROMPTS = ("ROMEO:", "First Citizen:\nBefore we proceed any further, hear me speak.\n", "What say you? " * 30)
CUT_SECONDS = 10.0
SETTLE_SECONDS = 3.0
"""Time in which servers notice that a router is gone."""
STALLED_SECONDS = 20.0
"""A stream that gets nothing for so long is reported, with the state of the cluster."""
FLAGS = ("--threads", "1", "--max-model-len", "1024", "--no-spare")


@dataclass
class Tally:
    """What the clients saw."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    """Answers with more tokens than there are."""
    lost: list[str] = field(default_factory=list)
    orphans: int = 0
    """Requests that ran in engines although no client waited for them, after a router was killed."""
    repeated: int = 0
    """Requests that clients sent again to a router that had been killed."""
    poison_refused: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    pauses: list[float] = field(default_factory=list)
    """The longest pause of each answer that saw a fault, in seconds."""
    router_deaths: int = 0

    @property
    def is_clean(self) -> bool:
        return not (self.wrong or self.duplicated or self.lost or self.orphans)

    def __str__(self) -> str:
        pauses = sorted(self.pauses) or [0.0]
        return (
            f"faults {dict(self.faults)}: {self.right} answers right, {len(self.lost)} lost, {len(self.duplicated)} "
            f"duplicated, {len(self.wrong)} wrong; {self.orphans} orphans; {self.repeated} asked again; "
            f"{self.poison_refused} deadly requests refused; {len(pauses)} answers saw a fault, pause p50 "
            f"{pauses[len(pauses) // 2]:.2f} s, p99 {pauses[len(pauses) * 99 // 100]:.2f} s"
        )


async def ask(
    client: httpx.AsyncClient, url: str, kind: str, prompt: str, seen: OpenStream
) -> tuple[list[list[int]], float]:
    """Tokens of each choice, and the longest time between two events. Raises `httpx.HTTPError` and `RuntimeError`."""
    body = {"prompt": prompt, "max_tokens": 200, "ignore_eos": True, "return_token_ids": True, "stream": True}
    choices: dict[int, list[int]] = {}
    last, pause = time.monotonic(), 0.0
    async with client.stream("POST", f"{url}/v1/completions", json={**body, **KINDS[kind]}) as response:
        seen.replica = response.headers.get("x-quire-replica", url)
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code} {(await response.aread())[:200]!r}")
        is_done = "event-stream" not in response.headers["content-type"]
        async for line in response.aiter_lines():
            now = seen.last_event = time.monotonic()
            last, pause = now, max(pause, now - last)
            is_done |= line == "data: [DONE]"
            content = line.removeprefix("data: ")
            if not content.startswith("{"):
                continue
            event = json.loads(content)
            if "error" in event:
                raise RuntimeError(content)
            for choice in event["choices"]:
                choices.setdefault(choice["index"], []).extend(choice["token_ids"] or ())
            seen.answer_id, seen.num_tokens = event["id"], sum(map(len, choices.values()))
    if not is_done:
        raise RuntimeError("the stream ended without its last event")
    return [choices[index] for index in sorted(choices)], pause


async def stream(
    cluster: Cluster, expected: dict[tuple[str, str], Any], tally: Tally, until: float, watched: StalledStreams
) -> None:
    """Ask one request after the other, and at least one."""
    me = id(asyncio.current_task())
    while True:
        kind, prompt = random.choice(list(expected))
        begun, faults = time.monotonic(), tally.faults.total()
        while True:
            deaths = tally.router_deaths
            try:
                seen = watched.streams[me] = OpenStream(f"{kind} {prompt[:10]!r}")
                tokens, pause = await ask(cluster.client, cluster.router.url, kind, prompt, seen)
            except (httpx.HTTPError, RuntimeError) as error:
                if tally.router_deaths == deaths and not isinstance(error, httpx.ConnectError):
                    tally.lost.append(f"{seen}: {error!r}")
                    break
                if time.monotonic() - begun > 120.0:
                    tally.lost.append(f"{kind}: for two minutes {error!r}")
                    break
                tally.repeated += 1
                await asyncio.sleep(0.2)
                continue
            judge(tally, f"{kind} {prompt[:10]!r}", tokens, expected[kind, prompt])
            if tally.faults.total() > faults:
                tally.pauses.append(max(pause, time.monotonic() - begun if tally.router_deaths > deaths else 0.0))
            break
        del watched.streams[me]
        if time.monotonic() >= until:
            return


def judge(tally: Tally, name: str, tokens: list[list[int]], wanted: list[list[int]]) -> None:
    """Count an answer."""
    if tokens == wanted:
        tally.right += 1
    elif any(len(got) > len(want) for got, want in zip(tokens, wanted, strict=False)):
        tally.duplicated.append(f"{name}: {tokens} instead of {wanted}")
    else:
        tally.wrong.append(f"{name}: {tokens} instead of {wanted}")


async def break_down(cluster: Cluster, tally: Tally, streams: int, until: float) -> None:
    """One fault after the other; the next one comes when all servers take requests again."""
    faults = ["kill server", "kill router", "stop server", "deadly request"]
    faults += ["cut network"] if cluster.servers[0].namespace else []
    order: list[str] = []
    while time.monotonic() < until:
        await asyncio.sleep(random.uniform(1.0, 3.0))
        order = order or random.sample(faults, len(faults))
        fault, server = order.pop(), random.choice(cluster.servers)
        tally.faults[fault] += 1
        print(f"{time.strftime('%H:%M:%S')} {fault} ({server.url})", flush=True)
        await inflict(fault, cluster, server, tally, streams)
        await cluster.await_servers()


async def inflict(fault: str, cluster: Cluster, server: Member, tally: Tally, streams: int) -> None:
    """Do something bad, and return when it is over."""
    match fault:
        case "kill server":
            server.kill()
            await asyncio.sleep(1.0)
            server.start()
        case "kill router":
            tally.router_deaths += 1
            cluster.router.kill()
            await asyncio.sleep(random.uniform(0.1, 2.0))
            cluster.router.start()
            await cluster.await_servers()
            await asyncio.sleep(SETTLE_SECONDS)
            tally.orphans += max(0, await cluster.num_running() - streams)
        case "stop server":
            server.send(signal.SIGSTOP)
            await asyncio.sleep(CUT_SECONDS)
            server.send(signal.SIGCONT)
        case "cut network":
            # The far end: without the near one its address would be looked for on other networks.
            link = ["ip", "-n", server.namespace, "link", "set", "eth0"]
            subprocess.run([*link, "down"], check=True)
            await asyncio.sleep(CUT_SECONDS)
            subprocess.run([*link, "up"], check=True)
        case _:
            await send_deadly(cluster, tally)


async def send_deadly(cluster: Cluster, tally: Tally) -> None:
    """Send a request that engines die of, again and again. One server may find out, the others must not be asked."""
    prompt = [*DEADLY, random.randrange(100, 300)]
    for seed in range(4):
        with suppress(httpx.HTTPError):
            body = {"prompt": prompt, "max_tokens": 8, "seed": seed, "stream": seed % 2 == 1}
            answer = await cluster.client.post(f"{cluster.router.url}/v1/completions", json=body)
            if "request_quarantined" in answer.text:
                tally.poison_refused += 1
            else:
                tally.wrong.append(f"a deadly request was answered with {answer.status_code} {answer.text[:200]}")


async def chaos(*, seconds: float, servers: int, streams: int, base_port: int, other: str, logs: Path) -> Tally:
    """Run streams under faults for `seconds`."""
    logs.mkdir(parents=True, exist_ok=True)
    tally = Tally()
    with ExitStack() as stack:
        spaces = make_namespaces(stack, servers)
        members = []
        for number in range(servers):
            name, host = spaces[number] if spaces else ("", "127.0.0.1")
            port, source = base_port + 1 + number, other if number == servers - 1 else ""
            given = ("serve", "--host", host, "--port", str(port), "--allow-unauthenticated", *FLAGS)
            log = logs / f"server{number}.log"
            members.append(Member(*given, url=f"http://{host}:{port}", log=log, namespace=name, source=source))
            stack.enter_context(members[-1])
        urls = ",".join(each.url for each in members)
        asked = ("router", "--backends", urls, "--port", str(base_port))
        router = Member(*asked, url=f"http://127.0.0.1:{base_port}", log=logs / "router.log")
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
            cluster = Cluster(members, router, client)
            while not all([await each.is_ready(client) for each in members]):
                await asyncio.sleep(0.2)
            stack.enter_context(router)
            await cluster.await_servers()
            expected = {}
            for kind in KINDS:
                for prompt in PROMPTS:
                    expected[kind, prompt] = (await ask(client, members[0].url, kind, prompt, OpenStream("")))[0]
            until = time.monotonic() + seconds
            watched = StalledStreams(cluster, STALLED_SECONDS)
            watching = asyncio.create_task(watched.watch())
            await asyncio.gather(
                break_down(cluster, tally, streams, until),
                *(stream(cluster, expected, tally, until, watched) for _ in range(streams)),
            )
            watching.cancel()
            await asyncio.sleep(SETTLE_SECONDS)
            tally.orphans += await cluster.num_running()
            print((await client.get(f"{router.url}/router")).text, flush=True)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--base-port", type=int, default=18_600, help="the router's; the servers' follow")
    parser.add_argument("--other", default="", help="folder with the sources of another version, for the last server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, default=Path("build/cluster_chaos"), help="folder for what they write")
    given = parser.parse_args()
    random.seed(given.seed)
    tally = asyncio.run(
        chaos(
            seconds=60 * given.minutes,
            servers=given.servers,
            streams=given.streams,
            base_port=given.base_port,
            other=given.other,
            logs=given.logs,
        )
    )
    print("\n".join([*tally.wrong[:3], *tally.duplicated[:3], *tally.lost[:10], str(tally)]))
    print(f"load average {os.getloadavg()[0]:.1f}")
    return 0 if tally.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
