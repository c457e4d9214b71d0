"""`quire top`: the numbers of the page's memory view on a terminal, from the same stream.

On a terminal it goes on until Ctrl-C. Where output is no terminal, or with --once, it prints once and ends.
"""

import asyncio
import sys
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from quire.cli.http_client import server_target
from quire.cli.ps import DEFAULT_URL, ApiKey, Url

Once = Annotated[bool, Parameter(negative=())]

_REFRESH_SECONDS = 0.5
_ONCE_SECONDS = 1.0
"""How long --once watches, so that it can say rates."""
_RATE_SECONDS = 3.0
"""Rates are of this last while."""
_MAX_ROWS = 40


def top(*, url: Url = DEFAULT_URL, api_key: ApiKey = None, once: Once = False) -> None:
    """Watch a running server: requests, blocks, tokens per second, cache hits, waste. Ctrl-C ends.

    Parameters
    ----------
    url
        The server.
    api_key
        The server's API key. A key that is no admin's sees its own requests.
    once
        Print once, after a second, and end. Without a terminal for the output this is always so.
    """
    target = server_target(url, "/kv/stream", api_key)
    asyncio.run(_print_once(target.events(None)) if once or not sys.stdout.isatty() else _watch(target.events(None)))


@dataclass
class Screen:
    """What the stream has said so far."""

    state: str = ""
    shape: dict[str, Any] = field(default_factory=dict)
    requests: dict[int, dict[str, Any]] = field(default_factory=dict)
    history: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    """The stats of the last seconds, with their times."""

    def apply(self, frame: dict[str, Any], now: float) -> None:
        """Take over a frame of the stream."""
        self.state = frame["state"]
        if "shape" in frame:
            self.shape, self.requests, self.history = frame["shape"], {}, []
        for slot in frame.get("ended", ()):
            self.requests.pop(slot, None)
        for row in frame.get("requests", ()):
            self.requests[row["slot"]] = row
        if "stats" in frame:
            self.history.append((now, frame["stats"]))
            self.history = [entry for entry in self.history if now - entry[0] <= _RATE_SECONDS] or self.history[-1:]

    def rate(self, name: str, now: float) -> float:
        """How much a total grew per second lately."""
        recent = [(at, stats) for at, stats in self.history if now - at <= _RATE_SECONDS]
        if not recent:
            return 0.0
        seconds = max(now - recent[0][0], 1e-3)
        return float(recent[-1][1][name] - recent[0][1][name]) / seconds

    def summary(self, now: float) -> list[str]:
        """Lines on the whole server; one line for a key that does not see it."""
        if not self.state:
            return ["waiting for the server's first word"]
        if not self.history:
            return [f"engine {self.state}; this key sees its own requests"]
        stats = self.history[-1][1]
        used, blocks = stats["num_used_blocks"], max(1, stats["num_blocks"])
        waste = 1 - stats["num_filled_slots"] / stats["num_allocated_slots"] if stats["num_allocated_slots"] else 0.0
        hits, queries = stats["total_prefix_hits"], stats["total_prefix_queries"]
        tiers = [f"{name} tier {tier['num_blocks']} blocks" for name, tier in stats["tiers"].items()]
        return [
            f"engine {self.state}: {stats['num_running']} running, {stats['num_waiting']} waiting, "
            f"{stats['total_preemptions']} preemptions",
            f"blocks: {used} of {stats['num_blocks']} used ({used / blocks:.1%}), "
            f"{stats['num_cached_free_blocks']} free but cached, {waste:.1%} waste, "
            f"{stats['num_shared_slots']} slots saved by sharing",
            f"tokens/s: {self.rate('total_generated_tokens', now):.1f} generated, "
            f"{self.rate('total_prompt_tokens', now):.1f} of prompts; steps/s: {self.rate('total_steps', now):.1f}",
            f"prefix cache: {hits} of {queries} prompt tokens found ({hits / max(1, queries):.1%}), "
            f"{stats['total_block_copies']} blocks copied on write, {stats['total_evictions']} evicted",
            *tiers,
        ]

    def rows(self) -> list[list[str]]:
        """A row for each unfinished request, the oldest first."""
        return [
            [
                row["request_id"],
                row["state"],
                str(row["num_samples"]),
                str(row["num_tokens"]),
                str(row["num_blocks"]),
                str(row["num_references"] - row["num_blocks"]),
                str(sum(row["cached_tokens"].values())),
                row["miss"][1] if row["miss"] else "",
                str(row["num_preemptions"]),
            ]
            for _, row in sorted(self.requests.items())
        ]

    def draw(self, now: float) -> Group:
        """All of it for a terminal. Names are shown as plain text, not as markup."""
        table = Table(box=None, pad_edge=False)
        for title in ("request", "state", "samples", "tokens", "blocks", "shared", "cached", "miss", "preempted"):
            table.add_column(title, overflow="ellipsis", no_wrap=True)
        rows = self.rows()
        for row in rows[:_MAX_ROWS]:
            table.add_row(*map(Text, row))
        more = [Text(f"and {len(rows) - _MAX_ROWS} more")] if len(rows) > _MAX_ROWS else []
        return Group(*map(Text, self.summary(now)), *([table] if rows else []), *more)


async def _follow(events: Any, screen: Screen) -> None:
    async with aclosing(events) as frames:
        async for frame in frames:
            screen.apply(frame, time.monotonic())


async def _print_once(events: Any) -> None:
    screen = Screen()
    following = asyncio.create_task(_follow(events, screen))
    await asyncio.wait((following,), timeout=_ONCE_SECONDS)
    if following.done():
        following.result()
    following.cancel()
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(screen.draw(time.monotonic()))


async def _watch(events: Any) -> None:
    screen = Screen()
    following = asyncio.create_task(_follow(events, screen))
    with Live(refresh_per_second=1 / _REFRESH_SECONDS, screen=True, auto_refresh=False) as live:
        while not following.done():
            live.update(screen.draw(time.monotonic()), refresh=True)
            await asyncio.wait((following,), timeout=_REFRESH_SECONDS)
    following.result()
