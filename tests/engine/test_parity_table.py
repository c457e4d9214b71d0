"""Every family in the whole engine: 64 greedy tokens equal transformers', alone and in a batch of seventeen, in chunks,
preempted and from the prefix cache; in int8 the logits stay near and the tokens are the same in every batch."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quire import LLM, RequestOutput, SamplingParams
from quire.kv_groups import KVLayout
from quire.model_config import ModelConfig
from tests.checkpoints import FAMILIES, make_checkpoint, reference_model

BLOCK_SIZE, NUM_STEPS = 8, 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS, ignore_eos=True)
RANDOM = random.Random(0)
LENGTHS = [60, 1, BLOCK_SIZE, 2 * BLOCK_SIZE, *(RANDOM.randint(2, 40) for _ in range(13))]
PROMPTS = [[RANDOM.randrange(256) for _ in range(length)] for length in LENGTHS]
INT8_ERROR, ROUTED_ERROR = 0.08, 0.25
"""Most that int8 may move log-probabilities in the mean, as a share of the spread of a position's logits. With experts
it is more: a random router chooses others where two are nearly equal."""


def make_llm(folder: Path, **options: int | str) -> LLM:
    return LLM(
        str(folder), **{"dtype": "float32", "block_size": BLOCK_SIZE, "max_num_seqs": 20, "threads": 1, **options}
    )


def reference_logits(oracle: torch.nn.Module, outputs: list[RequestOutput]) -> list[torch.Tensor]:
    """For each output, the logits from which its tokens were sampled. All are computed at once: what follows a text
    changes none of its logits."""
    texts = [[*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]] for output in outputs]
    longest = max(map(len, texts))
    with torch.inference_mode():
        logits = oracle(torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])).logits
    return [
        row[len(output.prompt_token_ids) - 1 : len(text)]
        for row, output, text in zip(logits, outputs, texts, strict=True)
    ]


def assert_greedy(oracle: torch.nn.Module, outputs: list[RequestOutput]) -> None:
    for output, logits in zip(outputs, reference_logits(oracle, outputs), strict=True):
        assert len(output.outputs[0].token_ids) == NUM_STEPS
        assert output.outputs[0].token_ids == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family, dtype="float32")
    layout = KVLayout.of(ModelConfig.from_folder(folder).spec)
    # The pool holds about four of the seventeen sequences at full length.
    num_blocks = 4 * layout.most_blocks(LENGTHS[0] + NUM_STEPS, BLOCK_SIZE)
    llm = make_llm(folder, num_blocks=num_blocks, max_num_batched_tokens=24, max_model_len=128)
    (alone,) = llm.generate(PROMPTS[:1], GREEDY)
    outputs = llm.generate(PROMPTS, GREEDY)
    assert_greedy(reference_model(folder), [alone, *outputs])
    stats = llm.stats()
    assert stats.total_preemptions > 0
    assert outputs[0].num_cached_tokens > 0
    assert stats.num_used_blocks == 0


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_in_int8(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family, dtype="float32")
    llm = make_llm(folder, quantization="int8", num_blocks=300, max_num_batched_tokens=24)
    params = replace(GREEDY, max_tokens=8)
    (alone,) = llm.generate(PROMPTS[:1], replace(params, prompt_logprobs=0))
    together = llm.generate(PROMPTS[:6], params)
    assert alone.outputs[0].token_ids == together[0].outputs[0].token_ids
    assert alone.prompt_logprobs is not None
    found = torch.tensor([next(iter(entry.values())).logprob for entry in alone.prompt_logprobs[1:] if entry])
    with torch.inference_mode():
        logits = reference_model(folder)(torch.tensor([PROMPTS[0]])).logits[0, :-1].float()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(PROMPTS[0][1:])[:, None])[:, 0]
    error = (found - expected).abs().mean() / logits.std(-1).mean()
    assert error < (ROUTED_ERROR if ModelConfig.from_folder(folder).num_experts else INT8_ERROR)
