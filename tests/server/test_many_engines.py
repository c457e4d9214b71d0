"""Several engines behind one server: who gets a request, and what happens when one is away or full."""

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from quire.config import EngineConfig
from quire.engine.async_engine import AsyncLLM
from quire.engine.device import Device, check_devices, take_cards
from quire.engine.metrics import Metrics
from quire.errors import ConfigError, EngineUnavailableError, QueueFullError
from quire.kv_events_config import KVEventsConfig
from quire.llm import LLM
from quire.outputs import CompletionOutput, EngineStats, RequestOutput
from quire.sampling_params import SamplingParams
from quire.server.many_engines import ManyEngines

PARAMS = SamplingParams()
BLOCK = 16


class Scripted:
    """An engine as `ManyEngines` uses it. It answers with as many chunks as it is asked tokens, when it is let go."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.state = "loading"
        self.advances = True
        self.outage: EngineUnavailableError | None = None
        self.model_names = ["model"]
        self.other_names: list[str] = []
        self.adapters = object()
        self.metrics = Metrics("model", index)
        self.block_size = BLOCK
        self.memory_plan = self
        self.num_blocks = 1000
        self.prompts: list[Any] = []
        self.closed = 0
        self.full = False
        self.go = asyncio.Event()
        self.prefixes: list[Any] = []

    async def start(self, *, memory: int) -> None:
        self.memory = memory
        self.state = "ready"

    async def generate(self, prompt: Any, params: SamplingParams, **_: Any) -> AsyncGenerator[RequestOutput, None]:
        if self.state != "ready":
            raise EngineUnavailableError(f"the engine is {self.state}")
        if self.full:
            raise QueueFullError("full", retry_after=1)
        self.prompts.append(prompt)
        try:
            await self.go.wait()
            sample = CompletionOutput(index=0, text="", token_ids=[1])
            yield RequestOutput("r", None, [], [sample], finished=True)
        finally:
            self.closed += 1

    async def register_prefix(self, prefix: list[int], salts: Sequence[str]) -> str:
        self.prefixes.append((prefix, salts))
        return f"prefix-{self.index}"


async def started(number: int) -> tuple[ManyEngines, list[Scripted]]:
    scripted = [Scripted(index) for index in range(number)]
    engines = ManyEngines(cast("list[AsyncLLM]", scripted))
    assert engines.state == "loading"
    await engines.start()
    assert len({each.memory for each in scripted}) == 1
    return engines, scripted


async def ask(engines: ManyEngines, prompt: Any, **options: Any) -> int:
    return len([output async for output in engines.generate(prompt, PARAMS, **options)])


def prompt_of(number: int, blocks: int = 8) -> list[int]:
    return [number] * (blocks * BLOCK)


def test_turns_of_a_conversation_stay_and_conversations_spread() -> None:
    async def run() -> None:
        engines, scripted = await started(3)
        for each in scripted:
            each.go.set()
        for turn in range(4):
            for conversation in range(6):
                assert await ask(engines, prompt_of(conversation) + [99] * (turn * 8)) == 1
        homes = [{prompt[0] for prompt in each.prompts} for each in scripted]
        assert [len(home) for home in homes] == [2, 2, 2]
        assert set.union(*homes) == set(range(6)), "no conversation moved"

    asyncio.run(run())


def test_a_salt_is_another_prompt() -> None:
    async def run() -> None:
        engines, scripted = await started(2)
        for each in scripted:
            each.go.set()
        for salt in ("a", "b", "a", "b"):
            await ask(engines, prompt_of(1), cache_salt=salt)
        assert [len(each.prompts) for each in scripted] == [2, 2]

    asyncio.run(run())


def test_requests_go_where_least_waits_and_texts_too() -> None:
    async def run() -> None:
        engines, scripted = await started(2)
        waiting = [asyncio.create_task(ask(engines, "a text" * 100)) for _ in range(6)]
        await asyncio.sleep(0)
        assert [len(each.prompts) for each in scripted] == [3, 3]
        for each in scripted:
            each.go.set()
        assert await asyncio.gather(*waiting) == [1] * 6
        assert all(replica.load.num_requests == 0 for replica in engines._fleet.replicas.values())

    asyncio.run(run())


def test_a_client_that_leaves_ends_its_request_in_the_engine() -> None:
    async def run() -> None:
        engines, scripted = await started(2)
        task = asyncio.create_task(ask(engines, prompt_of(1)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert [each.closed for each in scripted] == [1, 0]
        assert all(replica.load.num_requests == 0 for replica in engines._fleet.replicas.values())

    asyncio.run(run())


def test_the_server_is_ready_when_all_engines_are() -> None:
    async def run() -> None:
        engines, scripted = await started(2)
        assert (engines.state, engines.advances) == ("ready", True)
        scripted[1].state = "loading"
        assert (engines.state, engines.advances) == ("loading", False)
        scripted[1].state = "restarting"
        assert (engines.state, engines.advances) == ("ready", True)

    asyncio.run(run())


def test_an_engine_that_is_away_gets_nothing_new() -> None:
    async def run() -> None:
        engines, scripted = await started(2)
        for each in scripted:
            each.go.set()
        await ask(engines, prompt_of(1))
        scripted[0].state = "restarting"
        assert engines.state == "ready"
        assert engines.outage is None
        await ask(engines, prompt_of(1))
        assert [len(each.prompts) for each in scripted] == [1, 1]
        scripted[1].state = scripted[0].state = "down"
        scripted[0].outage = EngineUnavailableError("it starts again in 3 s", retry_after=3)
        assert engines.outage is scripted[0].outage
        with pytest.raises(EngineUnavailableError):
            await ask(engines, prompt_of(1))

    asyncio.run(run())


def test_a_full_queue_is_passed_over_until_all_are_full() -> None:
    async def run() -> None:
        engines, scripted = await started(2)
        for each in scripted:
            each.go.set()
        scripted[0].full = True
        assert [await ask(engines, prompt_of(number)) for number in range(4)] == [1] * 4
        assert len(scripted[1].prompts) == 4
        scripted[1].full = True
        with pytest.raises(QueueFullError):
            await ask(engines, prompt_of(1))
        assert all(replica.load.num_requests == 0 for replica in engines._fleet.replicas.values())

    asyncio.run(run())


def test_a_prefix_is_registered_everywhere() -> None:
    async def run() -> None:
        engines, scripted = await started(2)
        assert await engines.register_prefix([1, 2], ("salt",)) == "prefix-0"
        assert [each.prefixes for each in scripted] == [[([1, 2], ("salt",))]] * 2

    asyncio.run(run())


def test_metrics_show_every_engine_once() -> None:
    async def run() -> None:
        engines, scripted = await started(2)
        for number, each in enumerate(scripted):
            each.metrics.record_stats(EngineStats(total_steps=1, total_generated_tokens=10 + number))
        engines.metrics.observe_http(handler="/v1/models", method="GET", status=200, seconds=0.1)
        for _ in range(2):
            families = list(text_string_to_metric_families(engines.metrics.render().decode()))
            names = [family.name for family in families]
            assert len(names) == len(set(names)), "a metric is described once"
            (tokens,) = (family for family in families if family.name == "quire:generation_tokens")
            values = {s.labels["engine"]: s.value for s in tokens.samples if s.name.endswith("_total")}
            assert values == {"0": 10.0, "1": 11.0}
            assert "http_requests" in " ".join(names)

    asyncio.run(run())


def test_several_engines_only_run_behind_a_server() -> None:
    with pytest.raises(ConfigError, match="data_parallel_size is 2, but several engines only run behind `quire serve`"):
        LLM(data_parallel_size=2)
    with pytest.raises(ConfigError, match="data_parallel_size is 3, but several engines"):
        AsyncLLM(EngineConfig(data_parallel_size=3))


def test_each_engine_has_cards_and_ports_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    check_devices(4, Device("cuda", number=4))
    with pytest.raises(ConfigError, match="needs 4 CUDA devices, but the driver shows 3"):
        check_devices(4, Device("cuda", number=3))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = []
    for visible, index in ((None, 1), ("4,5,6,7", 1), ("4,5,6,7", 0)):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        take_cards(index, 2)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["2,3", "6,7", "4,5,6,7"]
    published = KVEventsConfig(endpoint="tcp://*:5557", replay_endpoint="ipc:///tmp/replay").of_engine(2)
    assert (published.endpoint, published.replay_endpoint) == ("tcp://*:5559", "ipc:///tmp/replay")
