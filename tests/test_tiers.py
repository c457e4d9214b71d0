"""Tiers in the real engine: equal tokens after evictions, preemptions, restarts and faults."""

import asyncio
import contextlib
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, AsyncLLM, ConfigError, EngineConfig, MemoryPlanError, SamplingParams
from quire.engine.fingerprint import fingerprint
from quire.engine.memory_plan import MemoryPlan, plan_memory
from quire.model_config import ModelConfig
from quire.outputs import RequestOutput
from quire.runner import disk_blocks
from tests.checkpoints import make_checkpoint

OPTIONS: dict[str, Any] = {"max_num_seqs": 32, "threads": 1, "dtype": "float32"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
PROMPTS = [list(range(5 + number, 45 + 2 * number)) for number in range(64)]
"""40 to 103 tokens."""
KINDS: dict[int, dict[str, int]] = {
    0: {"n": 2},
    3: {"beam_width": 3, "n": 3},
    4: {"n": 3},
}
PARAMS = [
    SamplingParams(seed=number, max_tokens=16, ignore_eos=True, **KINDS[number % 8]) if number % 8 in KINDS else GREEDY
    for number in range(len(PROMPTS))
]
BLOCKS_OF_LONGEST = 9
"""103 prompt + 16 output tokens take 8 blocks; the second sample of n = 2 shares only full ones and needs one more."""


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def roomy() -> Iterator[LLM]:
    with LLM(num_blocks=2000, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(roomy: LLM) -> list[list[list[int]]]:
    return tokens(roomy.generate(PROMPTS, PARAMS))


@pytest.mark.parametrize("host", [None, "1MiB"])
@pytest.mark.parametrize("disk", [None, "1GiB", "500KB"])
def test_64_requests_in_a_pool_for_3(
    expected: list[list[list[int]]], tmp_path: Path, host: str | None, disk: str | None
) -> None:
    tiers: dict[str, Any] = {"swap_space": host} if host else {}
    if disk:
        tiers |= {"disk_cache": str(tmp_path), "disk_cache_size": disk}
    for _ in range(2 if disk else 1):
        with LLM(num_blocks=3 * BLOCKS_OF_LONGEST, max_model_len=128, **OPTIONS, **tiers) as llm:
            assert tokens(llm.generate(PROMPTS, PARAMS)) == expected
            stats = llm.stats()
            assert stats.num_used_blocks == 0
            assert stats.total_evictions > 100
            assert stats.total_preemptions > 0
            assert set(stats.tiers) == {name for name, on in (("host", host), ("disk", disk)) if on}
            for tier in stats.tiers.values():
                assert tier.num_blocks or tier.total_saved, "a tiny tier may be empty between two blocks"
                assert tier.num_bytes <= tier.capacity_bytes
            if disk:
                assert disk_bytes(tmp_path) <= llm._engine.config.disk_cache_size + 2**17, "removals lag behind"
    if disk == "1GiB":
        assert stats.tiers["disk"].total_hits > 1000, "the second engine finds what the first has stored"


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in block_files(folder))


def block_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if len(path.name) == 64)


SYSTEM = list(range(7, 107))
"""Six full blocks and a rest."""


def ask(llm: LLM, *more: int) -> RequestOutput:
    (output,) = llm.generate([[*SYSTEM, *more]], GREEDY)
    return output


@pytest.fixture
def stored(roomy: LLM, tmp_path: Path) -> Path:
    """A folder in which an earlier engine has stored SYSTEM."""
    with LLM(num_blocks=100, disk_cache=str(tmp_path), **OPTIONS) as llm:
        assert tokens([ask(llm, 1)]) == tokens([ask(roomy, 1)])
        assert llm.stats().total_evictions == 0
    return tmp_path


def test_yesterdays_prompt_is_a_hit(roomy: LLM, stored: Path) -> None:
    with LLM(num_blocks=100, disk_cache=str(stored), **OPTIONS) as llm:
        output = ask(llm, 2)
        assert output.num_cached_tokens == 96
        assert tokens([output]) == tokens([ask(roomy, 2)])
        assert llm.stats().tiers["disk"].total_hits == 96


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_a_damaged_file_is_a_miss_and_never_wrong_tokens(
    roomy: LLM, stored: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with LLM(num_blocks=100, disk_cache=str(stored), **OPTIONS) as llm:
        contents = {path: bytearray(path.read_bytes()) for path in block_files(stored)}
        others = [*list(contents.values())[1:], b""]
        for (path, content), other in zip(contents.items(), others, strict=True):
            if damage == "flip":
                content[len(content) // 2] ^= 64
                path.write_bytes(content)
            elif damage == "truncate":
                path.write_bytes(content[:-1])
            elif damage == "remove":
                path.unlink()
            else:
                path.write_bytes(other)
        output = ask(llm, 2)
        assert tokens([output]) == tokens([ask(roomy, 2)])
        assert output.num_cached_tokens == 0
        assert (llm.stats().tiers["disk"].total_corrupt > 0) == (damage != "remove")
        assert ("its tokens are computed" in caplog.text) == (damage != "remove")


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"block_size": 8}, {"kv_cache_dtype": "float16"}])
def test_other_values_are_not_found(stored: Path, change: dict[str, Any]) -> None:
    with LLM(num_blocks=200, disk_cache=str(stored), **{**OPTIONS, **change}) as llm:
        assert ask(llm, 2).num_cached_tokens == 0


def test_another_salt_is_not_found(stored: Path) -> None:
    with LLM(num_blocks=100, disk_cache=str(stored), **OPTIONS) as llm:
        (output,) = llm.generate([[*SYSTEM, 2]], GREEDY, cache_salt="another tenant")
        assert output.num_cached_tokens == 0


def test_resetting_the_prefix_cache_removes_the_files(stored: Path) -> None:
    with LLM(num_blocks=100, disk_cache=str(stored), **OPTIONS) as llm:
        llm.reset_prefix_cache()
        assert ask(llm, 2).num_cached_tokens == 0
        llm.reset_prefix_cache()
    with LLM(num_blocks=100, disk_cache=str(stored), **OPTIONS) as llm:
        llm.reset_prefix_cache()
    assert llm.stats().tiers["disk"].num_blocks == 0


def test_a_file_that_may_not_grow_stops_the_tier_and_nothing_else(roomy: LLM, tmp_path: Path) -> None:
    """As on a full disk: the system refuses to write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with LLM(num_blocks=100, disk_cache=str(tmp_path), **OPTIONS) as llm:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
            assert tokens([ask(llm, 1)]) == tokens([ask(roomy, 1)])
            deadline = time.monotonic() + 10
            while not llm.stats().tiers["disk"].stopped and time.monotonic() < deadline:
                ask(llm, 1)
            stats = llm.stats().tiers["disk"]
            assert (stats.stopped, stats.num_blocks) == (True, 0)
            assert tokens([ask(llm, 2)]) == tokens([ask(roomy, 2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert block_files(tmp_path) == []


def flush(llm: LLM, num_blocks: int) -> None:
    """Step an idle engine until the disk has so many blocks."""
    deadline = time.monotonic() + 20
    while llm.stats().tiers["disk"].num_blocks < num_blocks:
        assert time.monotonic() < deadline, "the blocks never reached the disk"
        llm._engine._core.step()
        time.sleep(0.005)


def test_a_prompt_computed_by_one_engine_is_a_hit_for_another(
    roomy: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_blocks, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(disk_blocks, "_ALONE_SECONDS", 0.05)
    options: dict[str, Any] = {"disk_cache": str(tmp_path), **OPTIONS}
    with (
        LLM(num_blocks=100, **options) as one,
        LLM(num_blocks=60, **options) as other,
    ):
        assert tokens([ask(other, 1)]) == tokens([ask(roomy, 1)])
        flush(other, 6)
        flush(one, 6)
        output = ask(one, 2)
        assert tokens([output]) == tokens([ask(roomy, 2)])
        assert output.num_cached_tokens == 96
        other.reset_prefix_cache()
        other._engine._core.step()
        assert tokens([ask(other, 3)]) == tokens([ask(roomy, 3)])


def test_a_served_engine_stores_when_idle_and_finds_after_a_kill(roomy: LLM, tmp_path: Path) -> None:
    """The engine process is killed: blocks that it saved while idle are found afterwards."""
    options = {**OPTIONS, "num_blocks": 100, "disk_cache": str(tmp_path)}

    async def ask_served(engine: AsyncLLM, prompt: list[int]) -> RequestOutput:
        total = None
        async for delta in engine.generate(prompt, GREEDY):
            if total is None:
                total = delta
            else:
                total.extend(delta)
        assert total is not None
        return total

    async def test() -> None:
        engine = AsyncLLM(EngineConfig(**options))
        await engine.start()
        try:
            await engine.wait_ready()
            await ask_served(engine, [*SYSTEM, 1])
            deadline = time.monotonic() + 20
            while engine.stats.tiers["disk"].num_blocks < 7 and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            os.kill(engine.engine_pid, signal.SIGKILL)
            while engine.state == "ready" and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            output = await ask_served(engine, [*SYSTEM, 2])
            assert output.num_cached_tokens == 96
            assert tokens([output]) == tokens([ask(roomy, 2)])
            text = engine.metrics.render().decode()
            assert 'quire:kv_tier_hits_total{engine="0",model_name="quire-bundled",tier="disk"} 96.0' in text
            assert "vllm:kv_tier" not in text
        finally:
            await engine.shutdown()

    asyncio.run(test())


# -- the plan and the options -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def plan_of(folder: Path, **options: Any) -> tuple[EngineConfig, MemoryPlan]:
    config = EngineConfig.from_options({"num_blocks": 10, **options})
    return config, plan_memory(config, ModelConfig.from_folder(folder), available=2**30)


def test_the_plan_counts_host_memory_and_staging(checkpoint: Path) -> None:
    _, without = plan_of(checkpoint)
    _, both = plan_of(checkpoint, swap_space="5MB", disk_cache="somewhere")
    block = without.kv_bytes_per_token * 16
    assert (without.swap_space, without.staging) == (0, 0)
    assert both.swap_space == 5_000_000 // block * block
    assert both.staging == 2 * (64 * 2**20 // block) * block
    assert both.total == without.total + both.swap_space + both.staging
    assert "+ swap space 4.758 MiB + staging 128 MiB for the disk tier" in both.describe()[0]
    assert "swap" not in without.describe()[0]


def test_a_tier_that_does_not_fit_is_refused_with_the_numbers(checkpoint: Path) -> None:
    with pytest.raises(MemoryPlanError, match="tiers below the KV cache 4 GiB, but 1 GiB are available"):
        plan_of(checkpoint, swap_space="4GiB")
    with pytest.raises(MemoryPlanError, match=r"swap_space is 4 B, less than one block .* give a size such as 4GiB"):
        plan_of(checkpoint, swap_space=4)


@pytest.mark.parametrize("option", [{"swap_space": 2**20}, {"disk_cache": "folder"}])
def test_tiers_need_the_prefix_cache(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="stored blocks are found by the prefix cache, which is off"):
        EngineConfig(enable_prefix_caching=False, **option)


def test_what_the_fingerprint_covers(checkpoint: Path, tmp_path: Path) -> None:
    seen = set()

    def add(folder: Path = checkpoint, instruction_set: str = "avx2", **options: Any) -> None:
        seen.add(fingerprint(*plan_of(folder, **options), folder, instruction_set))

    add()
    add(num_blocks=12)
    assert len(seen) == 1, "the size of the pool decides no value"
    for options in (
        {"dtype": "float16"},
        {"kv_cache_dtype": "bfloat16"},
        {"block_size": 32},
        {"load_format": "dummy"},
        {"load_format": "dummy", "seed": 1},
        {"instruction_set": "avx512"},
    ):
        add(**options)
    assert len(seen) == 7
    add(make_checkpoint(tmp_path, "llama", seed=1))
    weights = tmp_path / "model.safetensors"
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    add(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("10000.0", "20000.0"))
    with contextlib.suppress(FileNotFoundError):
        add(tmp_path)
    assert len(seen) == 10
