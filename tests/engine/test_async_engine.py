"""AsyncLLM with its real child process: streams, aborts, deaths, idleness, and what each process imports."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quire import LLM, AsyncLLM, EngineConfig, SamplingParams
from quire.engine import throughput
from quire.errors import (
    CheckpointError,
    ConfigError,
    EngineUnavailableError,
    QueueFullError,
    RequestError,
)
from tests.engine.serving import GREEDY, OPTIONS, PROMPTS, collect, run, until


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """The greedy tokens of PROMPTS, from the engine in this process."""
    llm = LLM(**OPTIONS)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_streams_requests_side_by_side_and_refuses_bad_ones(expected: list[list[int]]) -> None:
    async def test(engine: AsyncLLM) -> None:
        outputs = await asyncio.gather(*(collect(engine, prompt, GREEDY) for prompt in PROMPTS))
        assert [output.outputs[0].token_ids for output in outputs] == expected
        for bad, match in (({"logprobs": 21}, "at most 20"), ({"max_tokens": 5000}, "exceed this model.s context")):
            with pytest.raises(RequestError, match=match):
                await collect(engine, "O", GREEDY.with_changes(**bad))
        with pytest.raises(RequestError, match=r"can need .* KV blocks"):
            await collect(engine, "O", GREEDY.with_changes(n=16, max_tokens=900))
        with pytest.raises(RequestError, match=r"cannot go to another process: use LLM, or .*--logits-processors"):
            await collect(engine, "O", GREEDY.with_changes(logits_processors=[lambda output, logits: logits]))
        named = await collect(engine, "O", GREEDY, request_id="mine")
        assert named.request_id == "mine"
        many = await collect(engine, "O", SamplingParams(n=3, seed=1, max_tokens=12, stop=["e"], logprobs=1))
        assert sorted(output.index for output in many.outputs) == [0, 1, 2]
        best = await collect(engine, "O", SamplingParams(n=2, best_of=5, seed=1, max_tokens=12, stop=["e"]))
        assert [output.index for output in best.outputs] == [0, 1]
        first, second = (output.cumulative_logprob for output in best.outputs)
        assert first is not None
        assert second is not None
        assert first >= second
        await until(lambda: engine.stats.num_used_blocks == 0)

    run(test)


def test_embeddings_are_those_of_this_process_and_survive_a_death() -> None:
    prompts = [*PROMPTS, *([number] * 300 for number in range(5, 25))]
    expected = [output.outputs.embedding for output in LLM(**OPTIONS).embed(prompts, use_tqdm=False)]

    async def test(engine: AsyncLLM) -> None:
        beside = asyncio.create_task(collect(engine, PROMPTS[0], GREEDY))
        tasks = [asyncio.create_task(engine.embed(prompt, request_id="mine")) for prompt in prompts]
        await until(lambda: engine.stats.total_prompt_tokens > 900)
        os.kill(engine.engine_pid, signal.SIGKILL)
        outputs = await asyncio.gather(*tasks)
        assert all(output.request_id == "mine" for output in outputs)
        for output, embedding in zip(outputs, expected, strict=True):
            assert output.outputs.embedding == pytest.approx(embedding, abs=1e-5)
        await beside
        raw = await engine.embed("O", normalize=False)
        assert sum(value * value for value in raw.outputs.embedding) > 2
        with pytest.raises(RequestError, match="maximum context length is 1024 tokens"):
            await engine.embed([5] * 1025)
        assert len((await engine.embed([5] * 1030, truncate_prompt_tokens=-1)).prompt_token_ids) == 1024

    run(test)


def test_cancelling_an_embedding_frees_its_memory() -> None:
    async def test(engine: AsyncLLM) -> None:
        tasks = [asyncio.create_task(engine.embed([number] * 1000)) for number in range(5, 25)]
        await until(lambda: engine.stats.num_used_blocks > 0)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert any(isinstance(result, asyncio.CancelledError) for result in results)
        await until(lambda: engine.stats.num_used_blocks == 0)

    run(test)


def test_leaving_a_stream_frees_its_memory_within_a_step() -> None:
    async def test(engine: AsyncLLM) -> None:
        stream = engine.generate("ROMEO:", GREEDY.with_changes(max_tokens=900))
        await anext(stream)
        await until(lambda: engine.stats.num_used_blocks > 0)
        await stream.aclose()
        steps = engine.stats.total_steps
        await until(lambda: engine.stats.num_used_blocks == 0)
        assert engine.stats.total_steps - steps <= 2

        task = asyncio.create_task(collect(engine, "ROMEO:", GREEDY.with_changes(max_tokens=900)))
        await until(lambda: engine.stats.num_used_blocks > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.stats.num_used_blocks == 0)

    run(test)


def test_a_slow_reader_gets_merged_deltas(expected: list[list[int]]) -> None:
    async def test(engine: AsyncLLM) -> None:
        stream = engine.generate(PROMPTS[0], GREEDY)
        first = await anext(stream)
        await until(lambda: engine.stats.num_running == 0)
        rest = [delta async for delta in stream]
        assert len(rest) == 1
        first.extend(rest[0])
        assert first.outputs[0].token_ids == expected[0]

    run(test)


def test_a_killed_engine_costs_a_pause_and_no_request(
    expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "LOG_INTERVAL", 0.0)
    lines: list[str] = []

    async def test(engine: AsyncLLM) -> None:
        streams = [asyncio.create_task(collect(engine, prompt, GREEDY)) for prompt in PROMPTS]
        sampled = SamplingParams(n=2, max_tokens=60, seed=5, ignore_eos=True, prompt_logprobs=1)
        others = asyncio.create_task(collect(engine, "O, she doth teach", sampled))
        await until(lambda: engine.stats.total_generated_tokens > 40)
        os.kill(engine.engine_pid, signal.SIGKILL)
        outputs = await asyncio.gather(*streams)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert engine.state == "ready"
        again = await collect(engine, "O, she doth teach", sampled)
        first = await others
        tokens = [{sample.index: sample.token_ids for sample in output.outputs} for output in (first, again)]
        assert tokens[0] == tokens[1]
        assert first.prompt_logprobs is not None
        assert again.prompt_logprobs is not None
        assert len(first.prompt_logprobs) == len(again.prompt_logprobs) == len(again.prompt_token_ids)
        rates = [line for line in lines if "output tokens/s" in line]
        assert rates
        assert not any("-" in line for line in rates), "the rates stay positive after a restart"

    run(test, report=lines.append)


def test_registered_prefixes_come_back_after_a_death() -> None:
    async def test(engine: AsyncLLM) -> None:
        prefix = list(range(5, 105))
        await engine.register_prefix(prefix, ("tenant", "other"))
        with pytest.raises(RequestError, match=r"takes 37 more KV blocks .* hold 6 and may hold 20 of the pool's 40"):
            await engine.register_prefix([7] * 600)
        for num_deaths in range(2):
            await until(lambda: engine.stats.num_pinned_blocks == 6)
            for salt, cached in (("tenant", 96), ("other", 96), ("", 0)):
                output = await collect(engine, [*prefix, 3 + num_deaths], GREEDY, cache_salt=salt)
                assert (output.num_cached_tokens >= 96) == (cached == 96)
            os.kill(engine.engine_pid, signal.SIGKILL)
            await until(lambda: engine.state == "restarting")
            assert engine.stats.num_pinned_blocks == 0

    run(test, num_blocks=40)


def test_a_prefix_that_shares_blocks_counts_only_its_new_ones() -> None:
    """The same rule as `LLM`'s, because there is only one: the engine's."""
    first, second = list(range(5, 5 + 18 * 16)), [*range(5, 5 + 17 * 16), *[7] * 16]
    options = {"num_blocks": 60, "max_pinned_share": 0.4}

    async def test(engine: AsyncLLM) -> None:
        ids = [await engine.register_prefix(prefix) for prefix in (first, second)]
        assert len(set(ids)) == 2
        await until(lambda: engine.stats.num_pinned_blocks == 19)
        with pytest.raises(RequestError) as refusal:
            await engine.register_prefix([9] * 16 * 6)
        assert str(refusal.value) == refused_by_llm

    llm = LLM(**{**OPTIONS, **options})
    for prefix in (first, second):
        llm.register_prefix(prefix)
    assert llm.stats().num_pinned_blocks == 19
    with pytest.raises(RequestError, match=r"takes 6 more KV blocks .* hold 19 and may hold 24") as refusal:
        llm.register_prefix([9] * 16 * 6)
    refused_by_llm = str(refusal.value)
    run(test, **options)


def test_a_prefix_can_be_registered_while_the_engine_loads() -> None:
    async def main() -> None:
        engine = AsyncLLM(EngineConfig.from_options(OPTIONS))
        with pytest.raises(EngineUnavailableError, match="the engine is loading"):
            await engine.register_prefix([7] * 48)
        await engine.start()
        try:
            waiting = [asyncio.create_task(engine.register_prefix([token] * 48)) for token in (7, 8)]
            assert engine.state == "loading"
            assert await asyncio.gather(*waiting) == ["prefix-0", "prefix-1"]
            assert engine.state == "ready"
        finally:
            await engine.shutdown()
        with pytest.raises(EngineUnavailableError, match="the engine is dead"):
            await engine.register_prefix([7] * 48)

    asyncio.run(main())


def test_a_full_queue_answers_429() -> None:
    async def test(engine: AsyncLLM) -> None:
        long = GREEDY.with_changes(max_tokens=500)
        tasks = [asyncio.create_task(collect(engine, "O", long)) for _ in range(3)]
        await until(lambda: engine.stats.num_running == 1 and engine.stats.num_waiting == 2)
        with pytest.raises(
            QueueFullError, match=r"2 requests are waiting, the limit is 2 \(max_queue_size\)"
        ) as caught:
            await collect(engine, "O", long)
        assert caught.value.retry_after >= 1
        for never, match in (({"max_tokens": 5000}, "context"), ({"n": 2}, "n is 2"), ({"logprobs": 99}, "at most")):
            with pytest.raises(RequestError, match=match) as caught_too:
                await collect(engine, "O", long.with_changes(**never))
            assert not isinstance(caught_too.value, QueueFullError)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(test, max_num_seqs=1, max_queue_size=2)


def test_the_queue_counts_what_waits_and_not_what_runs() -> None:
    """All come before the engine reports any of them: token ids wait for no tokenizer."""

    async def test(engine: AsyncLLM) -> None:
        short = GREEDY.with_changes(max_tokens=8)
        ends = await asyncio.gather(*(collect(engine, [5], short) for _ in range(12)), return_exceptions=True)
        assert [isinstance(end, QueueFullError) for end in ends] == [False] * 10 + [True] * 2

    run(test, max_num_seqs=8, max_queue_size=2)


def test_an_idle_engine_uses_no_cpu() -> None:
    async def test(engine: AsyncLLM) -> None:
        await collect(engine, "O", GREEDY)
        stat = Path(f"/proc/{engine.engine_pid}/stat")

        def ticks() -> int:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            return int(fields[11]) + int(fields[12])  # user and system time

        await asyncio.sleep(0.3)
        before = ticks()
        await asyncio.sleep(1.0)
        assert ticks() == before

    run(test)


def test_draining_finishes_what_runs_and_takes_nothing_new(expected: list[list[int]]) -> None:
    async def main() -> None:
        engine = AsyncLLM(EngineConfig.from_options(OPTIONS))
        with pytest.raises(EngineUnavailableError, match="the engine is loading"):
            await collect(engine, "O", GREEDY)
        await engine.start()
        await engine.wait_ready()
        stream = engine.generate(PROMPTS[0], GREEDY)
        output = await anext(stream)
        stopping = asyncio.create_task(engine.shutdown(drain_seconds=60))
        await until(lambda: engine.state == "draining")
        with pytest.raises(EngineUnavailableError, match="the engine is draining"):
            await collect(engine, "O", GREEDY)
        async for delta in stream:
            output.extend(delta)
        assert output.outputs[0].token_ids == expected[0]
        await stopping
        assert engine._client.exit_code == 0

    asyncio.run(main())


def test_what_is_wrong_with_the_files_reaches_the_caller(tmp_path: Path) -> None:
    async def main(model: Path) -> None:
        engine = AsyncLLM(EngineConfig(model=str(model), num_blocks=10))
        try:
            await engine.start()
            await engine.wait_ready()
        finally:
            await engine.shutdown()

    with pytest.raises(CheckpointError, match="neither a folder"):
        asyncio.run(main(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="the logits processor json:loads cannot be loaded"):
        run(collect, logits_processors="json:loads")
    from quire.engine.checkpoint import bundled_folder

    for file in bundled_folder().iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[:100_000] if file.suffix == ".safetensors" else data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        asyncio.run(main(tmp_path))


def test_the_child_ends_with_its_parent() -> None:
    code = (
        "import asyncio, os\n"
        "from quire import AsyncLLM, EngineConfig\n"
        "async def main():\n"
        "    engine = AsyncLLM(EngineConfig(num_blocks=10, threads=1))\n"
        "    await engine.start()\n"
        "    await engine.wait_ready()\n"
        "    print(engine.engine_pid, flush=True)\n"
        "    os._exit(9)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "the engine process outlived the process that started it"
        time.sleep(0.05)


def test_the_api_process_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, quire.engine.async_engine\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pydantic', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_the_engine_process_loads_neither_a_tokenizer_nor_an_http_server() -> None:
    """Checked by the libraries it has mapped after a request with stop strings."""

    async def test(engine: AsyncLLM) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=8, stop=["no such text"], logprobs=1, ignore_eos=True)
        assert (await collect(engine, "ROMEO:", params)).outputs[0].text
        mapped = Path(f"/proc/{engine.engine_pid}/maps").read_text()
        assert "libtorch_cpu" in mapped
        assert [library for library in ("tokenizers", "httptools", "uvloop") if f"/{library}/" in mapped] == []

    run(test)
