"""Prompts with images give the tokens that transformers gives, however they are computed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from quire import LLM, SamplingParams
from quire.outputs import RequestOutput
from tests.vision_checkpoints import IMAGE, make_vision_checkpoint, random_image
from tests.vision_reference import assert_greedy, expected_logits

FAMILIES = ["llava", "llava_next", "idefics3", "smolvlm", "qwen2_5_vl"]
NUM_TOKENS = 32
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
WIDE, TALL, SMALL = random_image(100, 45, 1), random_image(50, 90, 2), random_image(20, 20, 3)


def chat(*parts: Image.Image | str) -> list[dict[str, Any]]:
    contents = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": contents}]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """Steps and blocks are small, so that borders of both fall inside images."""
    with LLM(str(folder), max_num_batched_tokens=24, max_num_seqs=8, num_blocks=400, block_size=8) as llm:
        yield llm


def tokens(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


def test_several_images_and_turns_beside_text(folder: Path, llm: LLM) -> None:
    turns = [
        *chat(WIDE, "What is this, and ", TALL, "?"),
        {"role": "assistant", "content": "A wall."},
        *chat(SMALL, "and?"),
    ]
    conversations = [turns, chat("No image."), chat(SMALL, "One.")]
    images = [[WIDE, TALL, SMALL], [], [SMALL]]
    outputs = llm.chat(conversations, GREEDY)
    for output, shown in zip(outputs, images, strict=True):
        assert_greedy(folder, output.prompt_token_ids, tokens(output), shown)


def test_log_probabilities_of_a_prompt_with_an_image(folder: Path, llm: LLM) -> None:
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (output,) = llm.chat(chat("See ", WIDE, " here"), params)
    expected = torch.log_softmax(expected_logits(folder, output.prompt_token_ids, [WIDE]), dim=-1)
    assert output.prompt_logprobs is not None
    for position, (token, found) in enumerate(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)):
        if found is not None:
            assert found[token].logprob == pytest.approx(expected[position - 1, token].item(), abs=2e-4)


def test_a_repeated_image_is_found_and_another_is_not(llm: LLM) -> None:
    llm.reset_prefix_cache()
    first, again, other, shifted = (
        llm.chat(messages, GREEDY)[0]
        for messages in (chat(WIDE, "Why?"), chat(WIDE, "Why?"), chat(TALL, "Why?"), chat("a", WIDE, "Why?"))
    )
    assert tokens(again) == tokens(first)
    assert again.num_cached_tokens == len(first.prompt_token_ids) - 1
    start = first.prompt_token_ids.index(IMAGE)
    assert other.num_cached_tokens <= start
    assert shifted.num_cached_tokens <= start
    assert tokens(other) != tokens(first)
