"""Models with sliding windows: what a window group gave back is not missed, in any mix of cache, tiers and forks."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.step import StepPlan
from tests.checkpoints import make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
OPTIONS: dict[str, Any] = {"dtype": "float32", "block_size": 8, "max_num_seqs": 20, "threads": 1}
RNG = random.Random(3)
PROMPTS = [[RNG.randrange(256) for _ in range(length)] for length in (1, 24, 33, 90, 130)]
"""Shorter than the window of 24 tokens, as long, and several times as long."""


@pytest.fixture(scope="module", params=["gemma3", "mistral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param, dtype="float32")


def tokens(llm: LLM, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in llm.generate(prompts, params)]


@pytest.fixture(scope="module")
def roomy(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), num_blocks=2000, **OPTIONS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 21},
        {"attention_backend": "sdpa"},
        {"deterministic": True},
        {"kv_cache_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_what_was_given_back_is_never_read(checkpoint: Path, options: dict[str, Any], monkeypatch: Any) -> None:
    """Before every step all memory that nobody holds becomes NaN, which would spread to every token that reads it."""
    plain = LLM(str(checkpoint), num_blocks=300, enable_prefix_caching=False, **OPTIONS, **options)
    expected = tokens(plain, PROMPTS)
    poisoned = LLM(str(checkpoint), num_blocks=300, enable_prefix_caching=False, **OPTIONS, **options)
    core = poisoned._engine._core
    pool, runner = core._scheduler.pool, core._executor
    launch = runner.launch

    def poison_and_launch(plan: StepPlan) -> Any:
        free = torch.tensor(list(pool.free_order()))
        for part in runner._kv_cache.parts:
            for memory in (part.keys, part.values):
                memory[free] = float("nan")
        return launch(plan)

    monkeypatch.setattr(runner, "launch", poison_and_launch)
    assert tokens(poisoned, PROMPTS) == expected
    # Batch-invariant plans read the keys of a window from a multiple of 256 on, and no prompt here is that long.
    assert (pool.total_given_back > 0) == (not options.get("deterministic"))


def test_memory_of_a_long_sequence_is_bounded_by_the_window(checkpoint: Path, monkeypatch: Any) -> None:
    llm = LLM(str(checkpoint), num_blocks=200, **OPTIONS)
    core = llm._engine._core
    pool, runner = core._scheduler.pool, core._executor
    launch, used = runner.launch, list[int]()

    def count_and_launch(plan: StepPlan) -> Any:
        used.append(pool.num_used)
        return launch(plan)

    monkeypatch.setattr(runner, "launch", count_and_launch)
    tokens(llm, PROMPTS[-1:], replace(GREEDY, max_tokens=100))
    num_windowed = sum(group.window > 0 for group in llm.memory_plan.kv_groups)
    assert used[0] == pool.num_groups * 17, "a step needs the blocks of all its tokens"
    assert max(used[2:]) <= pool.most_blocks(230)
    assert pool.total_given_back >= num_windowed * 22


@pytest.mark.parametrize("tiers", [{}, {"swap_space": "64KiB"}, {"swap_space": "2MiB"}, {"disk_cache": True}])
def test_prompts_resume_and_return_from_every_tier(
    checkpoint: Path, roomy: LLM, tmp_path: Path, tiers: dict[str, Any]
) -> None:
    """A pool for about two of them; each prompt comes again longer, so its window begins in another block."""
    if "disk_cache" in tiers:
        tiers = {"disk_cache": str(tmp_path), "disk_cache_size": "4MiB"}
    num_blocks = 2 * roomy._engine._core._scheduler.pool.most_blocks(200) + 4
    llm = LLM(str(checkpoint), num_blocks=num_blocks, max_model_len=240, max_num_batched_tokens=40, **OPTIONS, **tiers)
    longer = [[*prompt, *range(7)] for prompt in PROMPTS]
    for prompts in (PROMPTS, longer, PROMPTS):
        assert tokens(llm, prompts) == tokens(roomy, prompts)
    stats = llm.stats()
    assert stats.num_used_blocks == 0
    if tiers and tiers.get("swap_space") != "64KiB":
        assert sum(tier.total_hits for tier in stats.tiers.values()) > 0


@pytest.mark.parametrize(
    "params",
    [replace(GREEDY, n=3, temperature=0.8, seed=1), replace(GREEDY, beam_width=3, n=2)],
    ids=["samples", "beams"],
)
def test_forks_keep_what_their_own_window_needs(checkpoint: Path, roomy: LLM, params: SamplingParams) -> None:
    num_blocks = 3 * roomy._engine._core._scheduler.pool.most_blocks(200) + 12
    llm = LLM(str(checkpoint), num_blocks=num_blocks, max_model_len=240, **OPTIONS)
    expected = tokens(roomy, PROMPTS, params)
    assert tokens(llm, PROMPTS, params) == expected
    assert tokens(llm, PROMPTS, params) == expected


def test_registered_prefixes_and_speculation(checkpoint: Path, roomy: LLM) -> None:
    llm = LLM(str(checkpoint), num_blocks=300, speculative_config={"num_speculative_tokens": 4}, **OPTIONS)
    llm.register_prefix(PROMPTS[-1])
    pinned = llm.stats().num_pinned_blocks
    assert pinned == llm._engine._core._scheduler.pool.blocks_after(128)
    prompts = [[*PROMPTS[-1], *[number, 1, 2] * 5] for number in range(4)]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.num_cached_tokens for output in outputs] == [128] * 4
    assert [[sample.token_ids for sample in output.outputs] for output in outputs] == tokens(roomy, prompts)
    assert llm.stats().num_used_blocks == pinned
