"""Prompts with images give the tokens that transformers gives, however they are computed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from quire import LLM, SamplingParams
from quire.errors import RequestError
from quire.outputs import RequestOutput
from tests.vision_checkpoints import IMAGE, make_vision_checkpoint, random_image
from tests.vision_reference import assert_greedy, expected_logits

FAMILIES = ["llava", "llava_next", "idefics3", "qwen2_5_vl"]
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


def test_samples_beams_and_preemption(folder: Path, llm: LLM) -> None:
    """The pool is too small for all requests at once; they give back their memory and resume."""
    (output,) = llm.chat(chat(SMALL, "Request 0"), GREEDY.with_changes(max_tokens=1))
    num_prompt_blocks = len(output.prompt_token_ids) // 8 + 1
    num_blocks = 3 * num_prompt_blocks + 6
    with LLM(str(folder), max_num_batched_tokens=64, max_num_seqs=8, num_blocks=num_blocks, block_size=8) as llm:
        params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
        images = [SMALL, *(random_image(20, 20, 10 + n) for n in range(3))]
        outputs = llm.chat([chat(image, f"Request {n}") for n, image in enumerate(images)], params)
        assert llm.stats().total_preemptions > 0
        for image, output in zip(images, outputs, strict=True):
            assert_greedy(folder, output.prompt_token_ids, tokens(output), [image])
        (sampled,) = llm.chat(chat(SMALL, "Request 0"), params.with_changes(n=2, max_tokens=6))
        assert [list(sample.token_ids) for sample in sampled.outputs] == [tokens(outputs[0])[:6]] * 2
        (searched,) = llm.chat(chat(SMALL, "Request 0"), SamplingParams(beam_width=2, n=2, max_tokens=6, temperature=0))
        best = list(searched.outputs[0].token_ids)
        logits = expected_logits(folder, [*searched.prompt_token_ids, *best], [SMALL])
        chosen = torch.log_softmax(logits[len(searched.prompt_token_ids) - 1 : -1], -1)
        expected = sum(chosen[index, token].item() for index, token in enumerate(best))
        assert searched.outputs[0].cumulative_logprob == pytest.approx(expected, abs=1e-3)


def test_prompts_as_texts_and_tokens(folder: Path, llm: LLM) -> None:
    by_text, by_tokens = llm.generate(
        [
            {"prompt": "<image> so", "multi_modal_data": {"image": SMALL}},
            {"prompt_token_ids": [IMAGE, *b" so"], "multi_modal_data": {"image": [SMALL]}},
        ],
        GREEDY,
    )
    assert_greedy(folder, by_text.prompt_token_ids, tokens(by_text), [SMALL])
    assert by_tokens.prompt_token_ids.count(IMAGE) == by_text.prompt_token_ids.count(IMAGE)
    assert_greedy(folder, by_tokens.prompt_token_ids, tokens(by_tokens), [SMALL])


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ({"prompt": "none", "multi_modal_data": {"image": SMALL}}, "holds <image> 0 times and comes with 1 images"),
        ({"prompt": "<image><image>", "multi_modal_data": {"image": SMALL}}, "2 times and comes with 1"),
        ({"prompt_token_ids": [1, 2], "multi_modal_data": {"image": SMALL}}, "0 times and comes with 1 images"),
        ({"prompt": "<image>", "multi_modal_data": {"video": SMALL}}, "may hold image"),
        ({"prompt": "<image>", "multi_modal_data": {"image": 7}}, "given as a int"),
        ({"multi_modal_data": {"image": SMALL}}, "no prompt or prompt_token_ids"),
        ({"prompt": "<image>" * 17, "multi_modal_data": {"image": [SMALL] * 17}}, "17 images; at most 16"),
    ],
)
def test_prompts_that_do_not_fit_their_images(prompt: dict[str, Any], reason: str, llm: LLM) -> None:
    with pytest.raises(RequestError, match=reason):
        llm.generate(prompt, GREEDY)  # type: ignore[arg-type]


def test_a_model_of_text_refuses_images() -> None:
    with LLM(num_blocks=64) as llm, pytest.raises(RequestError, match="reads text only"):
        llm.chat(chat(SMALL, "see"))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_names_of_other_years_and_flat_files(family: str, tmp_path: Path) -> None:
    """transformers' own names of today, and hub files that describe the text model at their top."""
    old, new = make_vision_checkpoint(tmp_path / "old", family), make_vision_checkpoint(tmp_path / "new", family)
    tensors = load_file(new / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model", "model.language_model")
        if name.startswith(("vision_tower", "multi_modal_projector", "visual")):
            name = f"model.{name}"
        elif family == "qwen2_5_vl" and name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        renamed[name] = tensor
    save_file(renamed, new / "model.safetensors")
    if family == "qwen2_5_vl":
        config = json.loads((new / "config.json").read_text())
        text = config.pop("text_config")
        text["rope_scaling"] = {"type": "mrope", "mrope_section": text.pop("rope_parameters")["mrope_section"]}
        (new / "config.json").write_text(json.dumps({**text, "rope_theta": 1e4, **config}))
    answers = []
    for folder in (old, new):
        with LLM(str(folder), num_blocks=100, max_num_seqs=4) as llm:
            answers.append(tokens(llm.chat(chat(WIDE, "What?"), GREEDY)[0]))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"attention_backend": "sdpa"}, {"dtype": "bfloat16"}])
def test_other_storage(options: dict[str, Any], tmp_path: Path) -> None:
    folder = make_vision_checkpoint(tmp_path, "qwen2_5_vl")
    with LLM(str(folder), num_blocks=100, max_num_seqs=4, **options) as llm:
        (output,) = llm.chat(chat(WIDE, "What?"), SamplingParams(max_tokens=1, logprobs=5, temperature=0))
    expected = torch.log_softmax(expected_logits(folder, output.prompt_token_ids, [WIDE])[-1], -1)
    assert output.outputs[0].logprobs is not None
    for token, found in output.outputs[0].logprobs[0].items():
        assert found.logprob == pytest.approx(expected[token].item(), abs=0.3)


def test_the_older_qwen_in_chunks(tmp_path: Path) -> None:
    folder = make_vision_checkpoint(tmp_path, "qwen2_vl")
    with LLM(str(folder), max_num_batched_tokens=24, max_num_seqs=8, num_blocks=200, block_size=8) as llm:
        (output,) = llm.chat(chat(WIDE, "What is this, and ", TALL, "?"), GREEDY)
    assert_greedy(folder, output.prompt_token_ids, tokens(output), [WIDE, TALL])
