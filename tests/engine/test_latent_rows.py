"""Latent rows and attention sinks in the whole engine: the same bits in every batch, and a memory plan that holds."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from tests.checkpoints import make_checkpoint, reference_model

PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=2)
RANDOM = random.Random(0)
PROMPTS = [[RANDOM.randrange(256) for _ in range(length)] for length in (1, 16, 130, 40, 7)]


def make_llm(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{"dtype": "float32", "num_blocks": 200, "threads": 2, "max_num_seqs": 8, **options})


def results(llm: LLM, prompts: list[list[int]]) -> list[Any]:
    samples = [output.outputs[0] for output in llm.generate(prompts, PARAMS)]
    return [(sample.token_ids, sample.logprobs) for sample in samples]


@pytest.mark.parametrize("options", [{}, {"quantization": "int8", "kv_cache_dtype": "int8"}], ids=["float32", "int8"])
@pytest.mark.parametrize("family", ["deepseek-v2", "gpt-oss"])
def test_no_bit_depends_on_the_batch(family: str, options: dict[str, str], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    together = results(make_llm(folder, deterministic=True, **options), PROMPTS)
    llm = make_llm(folder, deterministic=True, max_num_batched_tokens=20, enable_prefix_caching=False, **options)
    assert [results(llm, [prompt])[0] for prompt in PROMPTS] == together


def test_the_cache_holds_rows_alone(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "deepseek-v2")
    for dtype, row in (("float32", 48 * 4), ("bfloat16", 48 * 2), ("int8", 48 + 8)):
        llm = make_llm(folder, kv_cache_dtype=dtype)
        assert llm.memory_plan.kv_bytes_per_token == 3 * row
        assert llm.generate([[1, 2, 3]], PARAMS)[0].outputs[0].token_ids


@pytest.mark.parametrize("family", ["deepseek-v3", "gpt-oss"])
def test_the_plain_backend_serves_both(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    expected = [tokens for tokens, _ in results(make_llm(folder), PROMPTS)]
    llm = make_llm(folder, attention_backend="sdpa", block_size=16)
    assert [tokens for tokens, _ in results(llm, PROMPTS)] == expected


def test_rows_in_float8_have_a_scale(tmp_path: Path) -> None:
    """No element overflows, and log-probabilities stay near those of a float32 cache."""
    folder = make_checkpoint(tmp_path, "deepseek-v3")
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    found = []
    for dtype in ("float32", "fp8_e4m3"):
        llm = make_llm(folder, attention_backend="sdpa", kv_cache_dtype=dtype)
        (output,) = llm.generate([PROMPTS[2]], params)
        assert output.prompt_logprobs is not None
        found.append([next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry])
    differences = [abs(a - b) for a, b in zip(*found, strict=True)]
    assert 0 < sum(differences) / len(differences) < 0.1


def test_long_prompts_whose_keys_and_values_are_made(tmp_path: Path) -> None:
    """The tokens of transformers, also where a part of the prompt is in the cache."""
    folder = make_checkpoint(tmp_path, "deepseek-v2")
    oracle, llm = reference_model(folder), make_llm(folder)
    first = [RANDOM.randrange(256) for _ in range(240)]
    second = [*first[:40], *(RANDOM.randrange(256) for _ in range(200))]
    for prompt, cached in ((first, 0), (second, 40)):
        (output,) = llm.generate([prompt], PARAMS)
        assert output.num_cached_tokens == cached
        tokens = output.outputs[0].token_ids
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert tokens == logits.argmax(dim=-1).tolist()
