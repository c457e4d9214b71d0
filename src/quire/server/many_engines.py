"""ManyEngines: one server in front of several equal engines (data parallelism), each with a process and a pool.

The router's own policy chooses an engine for each request, by the blocks that it was sent before and by its load, in
tokens. An engine that dies is replaced and its requests go on, as with one engine; new ones meanwhile go to the others.
Reports about memory and the page of the KV pool show the first engine; metrics show all, by the label `engine`.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

from prometheus_client.metrics_core import Metric

from quire.config import EngineConfig
from quire.embeddings import EmbeddingRequestOutput
from quire.engine.async_engine import AsyncLLM
from quire.engine.device import check_devices, find_device, usable_cores
from quire.engine.input_processor import Prompt
from quire.engine.memory_sizes import available_memory
from quire.engine.metrics import Metrics
from quire.engine.request_streams import Tap
from quire.errors import EngineUnavailableError, QueueFullError
from quire.kv_cache.block_hash import hash_block, root_hash
from quire.outputs import RequestOutput
from quire.request import BegunPrompt
from quire.routing import policies
from quire.routing.fleet import Fleet
from quire.routing.replica import Work
from quire.sampling_params import SamplingParams
from quire.server.first_engine import FirstEngine

_KEY_BYTES = 8
"""The last bytes of a block hash, by which the fleet knows a block."""


class JoinedMetrics(Metrics):
    """The metrics of the first engine and of the server, and the engine metrics of the others."""

    def __init__(self, model_name: str, others: Sequence[Metrics]) -> None:
        super().__init__(model_name)
        self._others = others

    def collect(self) -> Iterable[Metric]:
        """All metrics; those of one name together."""
        joined: dict[str, Metric] = {}
        for metrics in (super().collect(), *(other.collect() for other in self._others)):
            for family in metrics:
                known = joined.get(family.name)
                if known is None:
                    known = joined[family.name] = Metric(family.name, family.documentation, family.type)
                elif family.name.startswith("process_"):  # all are counted in this one process
                    continue
                known.samples += family.samples
        return joined.values()


class ManyEngines(FirstEngine):
    """Implements `quire.server.backend.Engine` by engines that share the cores, the memory and the cards."""

    def __init__(self, engines: Sequence[AsyncLLM]) -> None:
        super().__init__(engines[0])
        self._engines = {f"engine {number}": engine for number, engine in enumerate(engines)}
        self._fleet = Fleet(policies.LeastWork(), max_blocks=1)
        engines[0].metrics = JoinedMetrics(engines[0].model_names[0], [other.metrics for other in engines[1:]])
        for other in engines[1:]:
            other.adapters = engines[0].adapters

    @classmethod
    def of(cls, config: EngineConfig, report: Callable[[str], None]) -> "ManyEngines":
        """The engines of a config: `data_parallel_size` of them, each with its share of the cores."""
        number = config.data_parallel_size
        check_devices(number * config.num_ranks, find_device(config.device))
        threads = config.threads or max(1, usable_cores() // (number * config.tensor_parallel_size))
        return cls(
            [
                AsyncLLM(
                    replace(
                        config,
                        data_parallel_size=1,
                        threads=threads,
                        kv_events_config=None
                        if config.kv_events_config is None
                        else config.kv_events_config.of_engine(index),
                    ),
                    lambda line, index=index: report(f"engine {index}: {line}"),  # type: ignore[misc]
                    index=index,
                )
                for index in range(number)
            ]
        )

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all engines with an equal share of the memory."""
        memory = available_memory() // len(self._engines)
        for name, engine in self._engines.items():
            await engine.start(memory=memory)
            self._fleet.join(name)
        self._fleet.index.max_blocks = self._first.memory_plan.num_blocks

    async def wait_ready(self) -> None:
        await asyncio.gather(*(engine.wait_ready() for engine in self._engines.values()))

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        await asyncio.gather(*(engine.shutdown(drain_seconds) for engine in self._engines.values()))

    @property
    def _usable(self) -> list[AsyncLLM]:
        return [engine for engine in self._engines.values() if engine.state == "ready"]

    @property
    def state(self) -> str:
        """ready while any engine is, once all are loaded."""
        states = [engine.state for engine in self._engines.values()]
        if "loading" in states:
            return "loading"
        return "ready" if "ready" in states else states[0]

    @property
    def advances(self) -> bool:
        return self.state == "ready" and any(engine.advances for engine in self._engines.values())

    @property
    def outage(self) -> EngineUnavailableError | None:
        """The first engine's, if no engine is ready."""
        return None if self._usable else self._first.outage

    @property
    def vectors(self) -> "ManyEngines":
        return self

    # -- requests -----------------------------------------------------------------------------------------------------

    def queue_refusal(self, tenant: str | None) -> QueueFullError | None:
        """The refusal of the last engine that is ready, if all of them refuse."""
        refusal = None
        for engine in self._usable:
            refusal = engine.queue_refusal(tenant)
            if refusal is None:
                return None
        return refusal

    async def generate(
        self, prompt: str | list[int] | BegunPrompt, params: SamplingParams, *, tap: Tap | None = None, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate` of the engine that is chosen. One whose queue is full is passed over for another."""
        seen = self._seen(prompt, options)
        full: set[str] = set()
        while True:
            work, engine = self._choose(seen, full)
            counted = None if tap is None else self._counting(tap, work)
            has_begun = False
            try:
                async with aclosing(engine.generate(prompt, params, tap=counted, **options)) as outputs:
                    async for output in outputs:
                        has_begun = True
                        self._count(work, output)
                        yield output
                return
            except QueueFullError:
                if has_begun or work is None or len(full) + 1 >= len(self._usable):
                    raise
                full.add(work.replica.name)
            finally:
                if work is not None:
                    self._fleet.end(work)

    async def embed(self, prompt: Prompt, **options: Any) -> EmbeddingRequestOutput:
        """As `AsyncLLM.embed` of the engine with the least work."""
        work, engine = self._choose(self._seen(prompt, options), ())
        try:
            return await engine.embed(prompt, **options)
        finally:
            if work is not None:
                self._fleet.end(work)

    async def register_prefix(self, prefix: list[int], salts: Sequence[str] = ("",)) -> str:
        """Register a prefix with every engine."""
        ids = await asyncio.gather(*(engine.register_prefix(prefix, salts) for engine in self._engines.values()))
        return ids[0]

    def reset_prefix_cache(self) -> None:
        """As `AsyncLLM.reset_prefix_cache` of every engine."""
        for engine in self._engines.values():
            engine.reset_prefix_cache()

    def _choose(self, prompt: policies.Prompt, full: Iterable[str]) -> tuple[Work | None, AsyncLLM]:
        """An engine that is ready; if none is, the first, which says why."""
        away = {name for name, engine in self._engines.items() if engine.state != "ready"}
        work = self._fleet.choose(prompt, away.union(full))
        return work, self._first if work is None else self._engines[work.replica.name]

    def _counting(self, tap: Tap, work: Work | None) -> Tap:
        """`tap`, and what it takes is counted."""
        if work is None:
            return tap
        count, take = self._fleet.add_tokens, tap.add

        def add(index: int, text: str, token_id: int, now: float) -> None:
            count(work, 1)
            take(index, text, token_id, now)

        return Tap(tap.ready, add)

    def _count(self, work: Work | None, output: RequestOutput) -> None:
        if work is not None:
            self._fleet.add_tokens(work, sum(len(sample.token_ids) for sample in output.outputs))

    def _seen(self, prompt: Prompt | BegunPrompt, options: dict[str, Any]) -> policies.Prompt:
        """The prompt as the policy sees it. Blocks of a text, and of a prompt with images, are not known here."""
        if isinstance(prompt, BegunPrompt):
            prompt = prompt.token_ids
        size = self.block_size
        if not isinstance(prompt, list):
            return policies.Prompt((), max(1, len(cast("str", prompt)) // 4), size)
        adapter = options.get("adapter")
        parent = root_hash(options.get("cache_salt", ""), size, "" if adapter is None else adapter.digest)
        blocks = []
        for end in range(size, len(prompt) + 1, size):
            parent = hash_block(parent, prompt[end - size : end])
            blocks.append(int.from_bytes(parent[-_KEY_BYTES:], "big"))
        return policies.Prompt(blocks, len(prompt), size)
