"""KV in int8 in the whole engine: its cost in perplexity, and scales that move with their blocks."""

from pathlib import Path

import pytest

from benchmarks.quantization import perplexity
from quire import LLM, SamplingParams
from tests.checkpoints import make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPTS = [list(range(5 + number, 45 + 2 * number)) for number in range(12)]


def test_perplexity_stays_near_that_of_float32() -> None:
    plain = perplexity(threads=1, num_tokens=2000, dtype="float32")
    assert 10 < plain < 25
    assert abs(perplexity(threads=1, num_tokens=2000, dtype="float32", kv_cache_dtype="int8") - plain) < 0.01 * plain


def make_llm(checkpoint: Path, **options: object) -> LLM:
    return LLM(str(checkpoint), dtype="float32", kv_cache_dtype="int8", threads=1, block_size=8, **options)


@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_scales_are_copied_evicted_and_restored(family: str, tmp_path: Path) -> None:
    """Samples that diverge inside a block, blocks that go to host memory and back, and a restart from disk."""
    checkpoint = make_checkpoint(tmp_path / "model", family)
    sampled = SamplingParams(n=3, seed=1, max_tokens=24, ignore_eos=True)

    def run(llm: LLM) -> list[list[list[int]]]:
        outputs = [*llm.generate(PROMPTS, GREEDY), *llm.generate(PROMPTS, sampled)]
        return [[sample.token_ids for sample in output.outputs] for output in outputs]

    with make_llm(checkpoint, num_blocks=600) as llm:
        expected = run(llm)
        assert llm.stats().total_block_copies > 0
    with make_llm(checkpoint, num_blocks=40, max_model_len=128, swap_space="8MiB") as llm:
        assert run(llm) == expected
        assert llm.stats().total_preemptions > 0
        assert llm.stats().tiers["host"].total_hits > 0
    for hits in (0, 1):
        with make_llm(checkpoint, num_blocks=600, disk_cache=str(tmp_path / "blocks")) as llm:
            assert run(llm) == expected
            assert (llm.stats().tiers["disk"].total_hits > 0) == bool(hits)
