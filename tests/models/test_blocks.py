"""What shared blocks make of a config: rotary layouts, parallel residuals, soft-caps and factors as data."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quire.layers.rotary import half_layout
from quire.model_config import ModelConfig, RopeConfig
from tests.checkpoints import make_checkpoint
from tests.paged_model import PagedModel

IDS = [(7 * place) % 250 for place in range(40)]


def logits(folder: Path, config: ModelConfig) -> torch.Tensor:
    model = PagedModel(folder, config=config)
    return torch.cat([model.step({0: IDS[:30]})[0], model.step({0: IDS[30:]})[0]])


def test_interleaved_rotation_is_an_order_of_rows(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama-bias")
    config = ModelConfig.from_folder(folder)
    rope = replace(config.rope or RopeConfig(), partial_rotary_factor=0.5)
    expected = logits(folder, replace(config, rope=rope))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    order = half_layout(32, 16, torch.device("cpu"))
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            interleaved = torch.empty_like(tensor).unflatten(0, (-1, 32))
            interleaved[:, order] = tensor.unflatten(0, (-1, 32))
            tensors[name] = interleaved.flatten(0, 1)
    save_file(tensors, file)
    found = logits(folder, replace(config, rope=replace(rope, layout="interleaved")))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (logits(folder, replace(config, rope=rope)) - expected).abs().max() > 1e-2


def test_interleaved_rotation_orders_the_norms_of_heads(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3")
    config = ModelConfig.from_folder(folder)
    assert config.rope is not None
    expected = logits(folder, config)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    order = half_layout(32, 32, torch.device("cpu"))
    for name, tensor in tensors.items():
        if any(part in name for part in ("q_proj", "k_proj", "q_norm", "k_norm")):
            interleaved = torch.empty_like(tensor).unflatten(0, (-1, 32))
            interleaved[:, order] = tensor.unflatten(0, (-1, 32))
            tensors[name] = interleaved.flatten(0, 1)
    save_file(tensors, file)
    found = logits(folder, replace(config, rope=replace(config.rope, layout="interleaved")))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_factors_and_soft_caps_of_the_ends(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    config = ModelConfig.from_folder(folder)
    expected = logits(folder, config)
    torch.testing.assert_close(
        logits(folder, replace(config, logits_softcap=3.0)), 3.0 * torch.tanh(expected / 3.0), rtol=0, atol=1e-5
    )
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] /= 2.71875
    save_file(tensors, file)
    # The factor is rounded to the checkpoint's dtype.
    scaled = replace(config, embedding_multiplier=2.72, round_embedding_multiplier=True, checkpoint_dtype="bfloat16")
    torch.testing.assert_close(logits(folder, scaled), expected, rtol=0, atol=1e-4)
