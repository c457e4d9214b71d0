"""What images may take: memory of requests in flight, of the plan, and time of a step."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from quire.config import EngineConfig
from quire.engine import request_streams
from quire.engine.memory_plan import plan_memory
from quire.engine.messages import ToEngine
from quire.engine.request_streams import RequestStreams
from quire.engine.watchdog import step_allowance
from quire.errors import ConfigError, QueueFullError
from quire.image_input import ImagePixels
from quire.model_config import ModelConfig
from quire.request import InputSpan, Request
from quire.sampling_params import SamplingParams
from tests.vision_checkpoints import make_vision_checkpoint


def request(number: int) -> Request:
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=[1, 2],
        params=SamplingParams(),
        inputs=(InputSpan(b"a", 0, 1),),
        pixels=(ImagePixels(bytes(300), 1, 10, 10),),
    )


async def _open_until_full(sent: list[ToEngine]) -> int:
    streams = RequestStreams(None, sent.append)
    opened = [streams.open(request(number), None) for number in range(3)]
    with pytest.raises(QueueFullError, match="take 900 bytes of pixels and these 300; the limit is 1,000"):
        streams.open(request(3), None)
    streams.close(opened[0])
    streams.open(request(4), None)
    return len(sent)


def test_pixels_in_flight_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_streams, "MAX_PIXEL_BYTES", 1000)
    assert asyncio.run(_open_until_full([])) >= 4


@pytest.mark.parametrize("family", ["llava", "llava_next", "smolvlm", "qwen2_5_vl"])
def test_the_plan_counts_images(family: str, tmp_path: Path) -> None:
    model = ModelConfig.from_folder(make_vision_checkpoint(tmp_path, family))
    config = EngineConfig(num_blocks=64, max_num_seqs=4)
    plan = plan_memory(config, model)
    without = plan_memory(replace(config, max_images=0), model)
    images = plan.images
    assert plan.total - without.total == images.num_bytes > images.kept_tokens * model.hidden_size * 4
    assert images.kept_tokens == 8 * images.tokens_per_image
    stored = sum(linear.num_parameters for linear in model.vision.linears) if model.vision else 0
    assert stored * 4 <= images.weights <= 1.5 * stored * 4
    tokens = images.tokens_per_image + 512
    assert plan.num_image_users == (min(4, 64 // -(-tokens // 16)) if tokens <= plan.max_model_len else 0)
    assert any(line.startswith(f"images: up to {images.tokens_per_image} tokens each") for line in plan.describe())
    assert not any("images" in line for line in without.describe())
    assert step_allowance(plan) > step_allowance(without)
    assert plan_memory(replace(config, image_cache_tokens=500), model).images.kept_tokens == 500


def test_spellings_of_vllm() -> None:
    for given in ({"image": 3}, '{"image": 3}', {"image": 3, "video": 0}):
        assert EngineConfig.from_options({"limit_mm_per_prompt": given}).max_images == 3
    for bad in ("3", {"pictures": 3}, {"image": -1}, {"image": "x"}):
        with pytest.raises(ConfigError):
            EngineConfig.from_options({"limit_mm_per_prompt": bad})
