"""Rows of ARCHITECTURES for models that read images. Their text model is described by a section of config.json, whose
model_type names another row."""

from dataclasses import replace
from typing import Any

from quire.model_config.architecture import Architecture

_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "eos_token_id": 2,
}
_QWEN: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "eos_token_id": 151645,
    "rope_sections": [16, 24, 24],
}
TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralForCausalLM", {**_LLAMA, "intermediate_size": 14336}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "eos_token_id": None},
    ),
    "qwen2_vl_text": ("Qwen2ForCausalLM", _QWEN),
    "qwen2_5_vl_text": ("Qwen2ForCausalLM", _QWEN),
}
"""model_type of the section → the row whose keys it has, and what it may leave out besides."""

VISION_ARCHITECTURES: dict[str, Architecture] = {
    "LlavaForConditionalGeneration": Architecture(
        model="quire.models.llava:Llava", section="text_config", vision="llava", text_model="llama"
    ),
    "LlavaNextForConditionalGeneration": Architecture(
        model="quire.models.llava:Llava", section="text_config", vision="llava_next", text_model="llama"
    ),
    "Idefics3ForConditionalGeneration": Architecture(
        model="quire.models.idefics3:Idefics3",
        section="text_config",
        vision="idefics3",
        text_model="llama",
        implied={"rms_norm_eps": 1e-5},
    ),
    "SmolVLMForConditionalGeneration": Architecture(
        model="quire.models.idefics3:Idefics3",
        section="text_config",
        vision="idefics3",
        text_model="llama",
        implied={"rms_norm_eps": 1e-5},
    ),
    "Qwen2VLForConditionalGeneration": Architecture(
        model="quire.models.qwen2_5_vl:Qwen25VL",
        section="text_config",
        vision="qwen2_vl",
        text_model="qwen2_vl_text",
    ),
    "Qwen2_5_VLForConditionalGeneration": Architecture(
        model="quire.models.qwen2_5_vl:Qwen25VL",
        section="text_config",
        vision="qwen2_5_vl",
        text_model="qwen2_5_vl_text",
    ),
}


def with_text_model(row: Architecture, text: Architecture, implied: dict[str, Any]) -> Architecture:
    """The row of a model that reads images, which reads what the row of its text model reads."""
    return replace(
        text,
        model=row.model,
        section=row.section,
        vision=row.vision,
        implied={**text.implied, **implied, **row.implied},
    )
