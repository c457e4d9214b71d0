"""KV events of other engines, which hash in their own way, in front of scripted servers."""

from collections.abc import Callable

import httpx
import pytest

from quire.kv_events.messages import BlockRemoved, BlockStored
from quire.router.app import RouterApp
from quire.router.backends import Backends
from quire.router.event_feed import EventFeed
from quire.router.token_prompts import prompt_of
from tests.router.fake_server import FakeServer
from tests.router.test_proxy import STREAM, count_on, route


@pytest.mark.parametrize(
    "name_of", [lambda number: 7 * number, lambda number: b"\xff" * 24 + number.to_bytes(8, "big")]
)
def test_prompts_follow_the_blocks_that_another_engine_tells(name_of: Callable[[int], int | bytes]) -> None:
    """Whatever its hashes are: its events hold the tokens, and /tokenize says which ones a prompt has."""
    servers = [FakeServer(count_on, block_size=0) for _ in range(4)]
    texts = [f"{number} has a document of its own. " * 20 for number in range(4)]

    async def test(client: httpx.AsyncClient, app: RouterApp, backends: Backends) -> None:
        feeds = [EventFeed(app._fleet, each.url, "tcp://127.0.0.1:1", backends.by_url[each.url]) for each in servers]
        for number, (feed, text) in enumerate(zip(feeds, texts, strict=True)):
            tokens, names = list(text.encode()), [name_of(100 * number + block) for block in range(1, 11)]
            feed.apply(BlockStored(names[:4], None, tokens[: 4 * 8], 8, extra_keys=[None] * 4))
            feed.apply(BlockStored(names[4:], names[3], tokens[4 * 8 : 10 * 8], 8))
            feed.apply(BlockStored([name_of(900)], name_of(99), tokens[:8], 8))  # its parent is not known
            feed.apply(BlockStored([name_of(901)], None, list(b"a salted"), 8, extra_keys=[["salt"]]))
        for number in (3, 0, 2, 1):
            content = [{"role": "user", "content": texts[number]}]
            await client.post("/v1/completions", json={**STREAM, "prompt": texts[number] + "What?"})
            await client.post("/v1/completions", json={**STREAM, "prompt": list(texts[number].encode())})
            await client.post("/v1/chat/completions", json={"model": "fake", "messages": content, "stream": True})
            assert len(servers[number].asked) == 3
        assert [app._fleet.index.num_blocks(app._fleet.replicas[each.url].number) > 10 for each in servers] == [
            True
        ] * 4
        assert not app._fleet.index.prefix_lengths(blocks_of("a salted"))
        feeds[1].apply(BlockRemoved([name_of(100 + block) for block in range(1, 11)]))
        assert app._fleet.index.prefix_lengths(blocks_of(texts[1])[:10]) == {}

    route(servers, test)


def blocks_of(text: str) -> list[int]:
    return list(prompt_of(list(text.encode()), 8, {}).blocks)
