"""Small checkpoints of models that read images, with random weights, written by transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.checkpoints import write_tokenizer

SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>"]
SPECIAL += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SPECIAL += ["<start_of_image>", "<end_of_image>"]
FIRST_SPECIAL = 260
IMAGE = FIRST_SPECIAL
START_OF_IMAGE = FIRST_SPECIAL + SPECIAL.index("<start_of_image>")
VOCAB_SIZE = FIRST_SPECIAL + len(SPECIAL)

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "initializer_range": 0.15,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_CLIP: dict[str, Any] = {**_TOWER, "image_size": 32, "patch_size": 8, "projection_dim": 16}
_SIGLIP: dict[str, Any] = {**_TOWER, "image_size": 32, "patch_size": 8}
_QWEN: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 48,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
_QWEN2: dict[str, Any] = {
    "depth": 3,
    "embed_dim": 32,
    "hidden_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "mlp_ratio": 2,
}
_GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 24,
}
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 3]}
_MEANS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_PROCESSORS: dict[str, dict[str, Any]] = {
    "llava": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "resample": 3,
        **_MEANS,
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
    },
    "llava_next": {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 32},
        "resample": 3,
        **_MEANS,
        "crop_size": {"height": 32, "width": 32},
        "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64], [96, 32]],
    },
    "qwen2_5_vl": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "resample": 3,
        "patch_size": 4,
        "merge_size": 2,
        **_MEANS,
        "size": {"shortest_edge": 1024, "longest_edge": 3000},
    },
    "idefics3": {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 96},
        "resample": 1,
        "max_image_size": {"longest_edge": 32},
        "do_image_splitting": True,
    },
}
_PROCESSORS["gemma3"] = {
    "image_processor_type": "Gemma3ImageProcessor",
    "size": {"height": 64, "width": 64},
    "resample": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_pan_and_scan": None,
    "image_seq_length": 16,
}
_PROCESSORS["qwen2_vl"] = _PROCESSORS["qwen2_5_vl"]
_PROCESSORS["smolvlm"] = {**_PROCESSORS["idefics3"], "image_processor_type": "SmolVLMImageProcessor"}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_vision_checkpoint(folder: Path, family: str, text: dict[str, Any] | None = None, **options: Any) -> Path:
    """Write a checkpoint of `family`; `text` changes its text model, `options` its config."""
    text_config: dict[str, Any] = {"model_type": "llama", **_TEXT, **(text or {})}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        match family:
            case "llava":
                config = LlavaConfig(
                    vision_config=CLIPVisionConfig(**_CLIP), text_config=text_config, image_token_index=IMAGE, **options
                )
                model = LlavaForConditionalGeneration(config)
            case "llava_next":
                pinpoints = _PROCESSORS[family]["image_grid_pinpoints"]
                options = {"image_grid_pinpoints": pinpoints, **options}
                config = LlavaNextConfig(
                    vision_config=CLIPVisionConfig(**_CLIP), text_config=text_config, image_token_index=IMAGE, **options
                )
                model = LlavaNextForConditionalGeneration(config)
            case "idefics3":
                config = Idefics3Config(vision_config=_SIGLIP, text_config=text_config, image_token_id=IMAGE, **options)
                model = Idefics3ForConditionalGeneration(config)
            case "smolvlm":
                config = SmolVLMConfig(vision_config=_SIGLIP, text_config=text_config, image_token_id=IMAGE, **options)
                model = SmolVLMForConditionalGeneration(config)
            case "gemma3":
                options = {"mm_tokens_per_image": 16, "image_token_index": IMAGE, **options}
                options |= {"boi_token_index": START_OF_IMAGE, "eoi_token_index": START_OF_IMAGE + 1}
                gemma3 = Gemma3Config(
                    vision_config={**_SIGLIP, "image_size": 64},
                    text_config={**_TEXT, **_GEMMA3, **(text or {})},
                    **options,
                )
                model = Gemma3ForConditionalGeneration(gemma3)
            case "qwen2_vl":
                text_config |= {"model_type": "qwen2_vl_text", "rope_parameters": _MROPE}
                config = Qwen2VLConfig(
                    vision_config=_QWEN2, text_config=text_config, image_token_id=IMAGE, video_token_id=0, **options
                )
                model = Qwen2VLForConditionalGeneration(config)
            case "qwen2_5_vl":
                text_config |= {"model_type": "qwen2_5_vl_text", "rope_parameters": _MROPE}
                config = Qwen2_5_VLConfig(
                    vision_config=_QWEN, text_config=text_config, image_token_id=IMAGE, video_token_id=0, **options
                )
                model = Qwen2_5_VLForConditionalGeneration(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not any(part in name for part in ("language_model", "text_model", "lm_head")):
                    parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name and name.endswith("weight")))
    model.generation_config.eos_token_id = 258
    with torch.no_grad():  # an answer with an image's token would be one image too many for transformers
        model.get_output_embeddings().weight[IMAGE] = 0
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSORS[family]))
    marker = "<start_of_image>" if family == "gemma3" else "<image>"
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<image>", marker))
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    assert tokenizer.token_to_id("<image>") == IMAGE
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; an object is changed key by key."""
    values = json.loads(path.read_text())
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict) and key.endswith("_config")
        values[key] = {**values[key], **value} if both else value
    path.write_text(json.dumps(values))


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with noise, so that every filter of a resize shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse).astype(int) + rng.integers(-40, 40, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
