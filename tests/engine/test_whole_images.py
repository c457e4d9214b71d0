"""Images whose tokens see each other (Gemma 3): the tokens that transformers gives, whatever the chunks, hits and
neighbours. An image has 16 tokens; two of three layers see a window of 24."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.config import EngineConfig
from quire.engine.memory_plan import plan_memory
from quire.errors import CheckpointError, ConfigError
from quire.model_config import ModelConfig
from tests.engine.test_images import chat, tokens
from tests.vision_checkpoints import IMAGE, edit_json, make_vision_checkpoint, random_image
from tests.vision_reference import assert_greedy, expected_logits

GREEDY = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
WIDE, TALL, SMALL = random_image(100, 45, 1), random_image(50, 90, 2), random_image(20, 20, 3)
TURNS = [
    *chat("Two of them, ", WIDE, " and, after some words, ", TALL, "?"),
    {"role": "assistant", "content": "A wall."},
    *chat(SMALL, "and?"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_checkpoint(tmp_path_factory.mktemp("gemma3"), "gemma3")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """A step has room for one image, whose tokens begin and end inside blocks."""
    with LLM(str(folder), max_num_batched_tokens=24, max_num_seqs=8, num_blocks=400, block_size=8) as llm:
        yield llm


def test_several_images_and_turns_beside_text(folder: Path, llm: LLM) -> None:
    outputs = llm.chat([TURNS, chat("No image."), chat(SMALL, "One."), chat("It is", TALL)], GREEDY)
    for output, shown in zip(outputs, [[WIDE, TALL, SMALL], [], [SMALL], [TALL]], strict=True):
        assert_greedy(folder, output.prompt_token_ids, tokens(output), shown)


def test_log_probabilities_of_a_prompt(folder: Path, llm: LLM) -> None:
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (output,) = llm.chat(TURNS, params)
    expected = torch.log_softmax(expected_logits(folder, output.prompt_token_ids, [WIDE, TALL, SMALL]), dim=-1)
    assert output.prompt_logprobs is not None
    for position, (token, found) in enumerate(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)):
        if found is not None:
            assert found[token].logprob == pytest.approx(expected[position - 1, token].item(), abs=2e-4)


def test_a_repeated_image_is_found_and_another_is_not(folder: Path, llm: LLM) -> None:
    llm.reset_prefix_cache()
    (first,) = llm.chat(chat("Look: ", WIDE, "Why?"), GREEDY)
    (again,) = llm.chat(chat("Look: ", WIDE, "Who?"), GREEDY)
    assert again.num_cached_tokens > first.prompt_token_ids.index(IMAGE)
    assert_greedy(folder, again.prompt_token_ids, tokens(again), [WIDE])
    (other,) = llm.chat(chat("Look: ", TALL, "Why?"), GREEDY)
    assert other.num_cached_tokens <= first.prompt_token_ids.index(IMAGE)


def test_preemption_and_samples(folder: Path) -> None:
    with LLM(str(folder), max_num_batched_tokens=64, max_num_seqs=8, num_blocks=34, block_size=8) as llm:
        images = [random_image(20, 20, 10 + n) for n in range(3)]
        for image in images:  # encoded alone; beside decoding sequences they would begin one after the other
            llm.chat(chat(image, "First"), GREEDY.with_changes(max_tokens=1))
        chats = [chat(image, f"Request {n}") for n, image in enumerate(images)]
        outputs = llm.chat(chats, GREEDY.with_changes(max_tokens=56))
        assert llm.stats().total_preemptions > 0
        for image, output in zip(images, outputs, strict=True):
            assert_greedy(folder, output.prompt_token_ids, tokens(output), [image])
        (sampled,) = llm.chat(chat(images[0], "Request 0"), GREEDY.with_changes(n=2, max_tokens=6))
        assert [list(sample.token_ids) for sample in sampled.outputs] == [tokens(outputs[0])[:6]] * 2


@pytest.mark.parametrize("options", [{"attention_backend": "sdpa"}, {"deterministic": True}], ids=str)
def test_other_plans(options: dict[str, Any], folder: Path) -> None:
    with LLM(str(folder), num_blocks=100, block_size=16, max_num_seqs=4, **options) as llm:
        (output,) = llm.chat(TURNS, GREEDY.with_changes(max_tokens=4))
    assert_greedy(folder, output.prompt_token_ids, tokens(output), [WIDE, TALL, SMALL])


def test_a_step_has_room_for_an_image(folder: Path) -> None:
    model = ModelConfig.from_folder(folder)
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens is 23, .* ask for at least 24"):
        plan_memory(EngineConfig(max_num_seqs=8, max_num_batched_tokens=23, num_blocks=64), model)
    plan_memory(EngineConfig(max_num_seqs=8, max_num_batched_tokens=23, num_blocks=64, max_images=0), model)
    assert plan_memory(EngineConfig(max_num_seqs=600, num_blocks=64), model).max_num_batched_tokens == 616


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mm_tokens_per_image": 15}, "mm_tokens_per_image is 15; supported: the square of a divisor of the 8 patches"),
        ({"mm_tokens_per_image": 9}, "mm_tokens_per_image is 9"),
        ({"text_config": {"sliding_window": 15}}, "sliding_window is 15; supported: at least the 16 tokens"),
        ({"vision_config": {"image_size": 60}}, "vision_config.image_size is 60; supported: a multiple of patch_size"),
        (
            {"vision_config": {"image_size": 32}},
            "vision_config.image_size is 32; supported: the size that preprocessor",
        ),
    ],
)
def test_configs_that_do_not_fit(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = make_vision_checkpoint(tmp_path, "gemma3")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=reason):
        ModelConfig.from_folder(folder)
