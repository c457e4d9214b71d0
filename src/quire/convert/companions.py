"""copy_companions: the files beside the weights: config, tokenizer, chat template, image processing, poolings."""

import json
import shutil
from pathlib import Path
from typing import Any

from quire.engine.tokenizer import Tokenizer
from quire.engine.tokenizer_files.gguf import gguf_settings
from quire.errors import CheckpointError
from quire.gguf.file import is_gguf, read_gguf
from quire.model_config.gguf_config import config_of, sampling_of
from quire.model_config.packed_folder import PACKED_FILE

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")
_INDEX = ".index.json"
MODEL_TYPES = {
    "ArceeForCausalLM": "arcee",
    "BloomForCausalLM": "bloom",
    "Cohere2ForCausalLM": "cohere2",
    "CohereForCausalLM": "cohere",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Dots1ForCausalLM": "dots1",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Exaone4ForCausalLM": "exaone4",
    "FalconForCausalLM": "falcon",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "GemmaForCausalLM": "gemma",
    "Glm4ForCausalLM": "glm4",
    "Glm4MoeForCausalLM": "glm4_moe",
    "GPT2LMHeadModel": "gpt2",
    "GPTBigCodeForCausalLM": "gpt_bigcode",
    "GPTNeoXForCausalLM": "gpt_neox",
    "GptOssForCausalLM": "gpt_oss",
    "GraniteForCausalLM": "granite",
    "GraniteMoeForCausalLM": "granitemoe",
    "LlamaForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "MptForCausalLM": "mpt",
    "Olmo2ForCausalLM": "olmo2",
    "OlmoeForCausalLM": "olmoe",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi",
    "PhimoeForCausalLM": "phimoe",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "SeedOssForCausalLM": "seed_oss",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}
"""Architectures of GGUF files → the type by which transformers chooses a class."""
_MAX_BYTES = 256 << 20
_MOST_FILES = 1000


def copy_companions(source: Path, folder: Path) -> None:
    """Write the companions of a model into `folder`. Those of a GGUF file are made of its metadata."""
    if is_gguf(source):
        _write_from_gguf(source, folder)
        return
    files = [path for path in sorted(source.glob("**/*")) if path.is_file() and _is_companion(path.relative_to(source))]
    if len(files) > _MOST_FILES:
        raise CheckpointError(f"{source} holds {len(files)} files beside its weights; at most {_MOST_FILES} are copied")
    for path in files:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; at most {_MAX_BYTES:,} are copied")
        place = folder / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def _is_companion(path: Path) -> bool:
    """Weights in a folder below belong to a module of sentence-transformers, which is never converted."""
    hidden = any(part.startswith((".", "__")) for part in path.parts)
    is_weight = len(path.parts) == 1 and (path.suffix in _WEIGHTS or path.name.endswith(_INDEX))
    return not hidden and not is_weight and len(path.parts) <= 2 and path.name != PACKED_FILE


def _write_from_gguf(source: Path, folder: Path) -> None:
    file = read_gguf(source)
    config = config_of(file)
    config["model_type"] = MODEL_TYPES[config["architectures"][0]]
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": config["eos_token_id"], **sampling_of(file)})
    write_json(folder / "tokenizer_config.json", gguf_settings(source))
    (folder / "tokenizer.json").write_text(Tokenizer.from_folder(source).to_json())


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
