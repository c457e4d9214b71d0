"""What transformers makes of a prompt with images: logits and greedy tokens, with its own image processors."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.vision_checkpoints import IMAGE

_PROCESSORS: dict[str, Any] = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "Gemma3ImageProcessor": Gemma3ImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "LlavaNextImageProcessor": LlavaNextImageProcessorPil,
    "Idefics3ImageProcessor": Idefics3ImageProcessorPil,
    "Qwen2VLImageProcessor": Qwen2VLImageProcessorPil,
    "SmolVLMImageProcessor": SmolVLMImageProcessorPil,
}


def processor_of(folder: Path) -> Any:
    kind = json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"]
    return _PROCESSORS[kind].from_pretrained(folder)


@cache
def reference(folder: Path) -> Any:
    """The model, in float32."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder).eval()


def pixel_values(folder: Path, images: list[Image.Image]) -> dict[str, Tensor]:
    """What transformers gives its model for images."""
    processor = processor_of(folder)
    splits = "Idefics3" in type(processor).__name__ or "SmolVLM" in type(processor).__name__
    found = processor([images] if splits else images, return_tensors="pt")
    names = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")
    return {name: found[name] for name in names if name in found}


def expected_logits(folder: Path, token_ids: list[int], images: list[Image.Image]) -> Tensor:
    """[number of tokens, vocab_size]"""
    inputs = pixel_values(folder, images) if images else {}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (torch.tensor([token_ids]) == IMAGE).int()
    if images and (folder / "preprocessor_config.json").read_text().count("Gemma3"):
        inputs["token_type_ids"] = (torch.tensor([token_ids]) == IMAGE).int()
    with torch.inference_mode():
        logits: Tensor = reference(folder)(torch.tensor([token_ids]), **inputs).logits[0]
    return logits


def assert_greedy(folder: Path, prompt: list[int], output: list[int], images: list[Image.Image]) -> None:
    """Every token of the output is the most likely one after those before it, so all are what greedy decoding gives."""
    logits = expected_logits(folder, [*prompt, *output[:-1]], images)[len(prompt) - 1 :]
    assert logits.argmax(dim=-1).tolist() == output
