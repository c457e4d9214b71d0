"""Greedy tokens equal transformers' with any batch, chunks, prefix hits and preemptions."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quire import LLM, RequestOutput, SamplingParams
from quire.kv_groups import KVLayout
from quire.model_config import ModelConfig
from tests.checkpoints import make_checkpoint, reference_model

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "gpt2",
    "gemma3",
    "stablelm-parallel",
    "mixtral",
    "gpt-oss",
    "deepseek-v2",
    "mpt-clipped",
]
"""One of every kind of attention and of layer; `test_parity_table` has all families."""
NUM_STEPS = 128
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS, ignore_eos=True)
BLOCK_SIZE = 8


def make_prompts(count: int, *, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts of different lengths, among them one token, one block, and one that ends with a full block."""
    rng = random.Random(seed)
    lengths = [1, BLOCK_SIZE, 2 * BLOCK_SIZE, *(rng.randint(2, longest) for _ in range(count))][:count]
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


def assert_greedy(oracle: torch.nn.Module, outputs: list[RequestOutput], num_steps: int = NUM_STEPS) -> None:
    """Every token is the most likely one after those before it; by induction, what transformers would generate."""
    for output in outputs:
        tokens = output.outputs[0].token_ids
        assert len(tokens) == num_steps
        prompt = output.prompt_token_ids
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert tokens == logits.argmax(dim=-1).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param, dtype="float32")


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> torch.nn.Module:
    return reference_model(checkpoint)


def make_llm(checkpoint: Path, **options: int) -> LLM:
    return LLM(
        str(checkpoint),
        dtype="float32",
        **{"block_size": BLOCK_SIZE, "max_num_seqs": 20, "num_blocks": 600, "threads": 1, **options},
    )


def test_one_request_and_a_prefix_hit(checkpoint: Path, oracle: torch.nn.Module) -> None:
    llm = make_llm(checkpoint)
    rng = random.Random(1)
    prompt = [rng.randrange(256) for _ in range(100)]
    first = llm.generate([prompt], GREEDY)
    again = llm.generate([prompt], GREEDY)
    assert_greedy(oracle, first)
    assert first[0].num_cached_tokens == 0
    assert again[0].num_cached_tokens == 99  # twelve blocks, and the thirteenth without its last token
    assert again[0].outputs[0].token_ids == first[0].outputs[0].token_ids


def test_prompts_that_part_inside_a_block(checkpoint: Path, oracle: torch.nn.Module) -> None:
    llm = make_llm(checkpoint)
    shared = make_prompts(4, longest=60)[3]
    llm.register_prefix([*shared, *range(BLOCK_SIZE)])
    prompts = [[*shared[: len(shared) - cut], 200 + cut, 7, 8] for cut in range(10)]
    outputs = llm.generate(prompts, GREEDY)
    assert_greedy(oracle, outputs)
    assert [output.num_cached_tokens for output in outputs] == [len(shared) - cut for cut in range(10)]
    assert llm.stats().total_block_copies >= 8
    assert llm.stats().num_used_blocks == llm.stats().num_pinned_blocks


def test_turns_of_a_conversation_compute_only_what_is_new(checkpoint: Path, oracle: torch.nn.Module) -> None:
    llm = make_llm(checkpoint)
    prompts = make_prompts(6, longest=60)[3:]
    for known in (0, 1, 1):
        outputs = llm.generate(prompts, replace(GREEDY, max_tokens=30))
        assert_greedy(oracle, outputs, 30)
        # The answer without its last token, whose KV is never computed, and the next message.
        assert [output.num_cached_tokens for output in outputs] == [known * (len(p) - 3) for p in prompts]
        prompts = [[*output.prompt_token_ids, *output.outputs[0].token_ids, 7, 8] for output in outputs]
    assert llm.stats().total_block_copies == 0


@pytest.mark.parametrize("batched_tokens", [512, 20], ids=["unchunked", "chunked"])
def test_seventeen_requests(checkpoint: Path, oracle: torch.nn.Module, batched_tokens: int) -> None:
    llm = make_llm(checkpoint, max_num_batched_tokens=batched_tokens)
    assert_greedy(oracle, llm.generate(make_prompts(17, longest=100), GREEDY))
    assert llm.stats().total_preemptions == 0


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_forced_preemptions(checkpoint: Path, oracle: torch.nn.Module, enable_prefix_caching: bool) -> None:
    # The pool holds about three of the seventeen sequences at full length.
    layout = KVLayout.of(ModelConfig.from_folder(checkpoint).spec)
    llm = make_llm(
        checkpoint,
        num_blocks=layout.most_blocks(240, BLOCK_SIZE) * 8 // 3,
        max_num_batched_tokens=64,
        enable_prefix_caching=enable_prefix_caching,
        max_model_len=240,
    )
    assert_greedy(oracle, llm.generate(make_prompts(17, longest=100), GREEDY))
    stats = llm.stats()
    assert stats.total_preemptions > 0
    assert stats.num_used_blocks == 0
