"""Adapters with random weights, saved by peft, and the same models in peft as the oracle."""

from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from tests.checkpoints import reference_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def make_adapter(folder: Path, base: Path, *, seed: int = 0, size: float = 0.3, **options: Any) -> Path:
    """Write an adapter of the checkpoint `base`. `options` are those of LoraConfig."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION + MLP, "lora_dropout": 0.0, **options})
    model = peft.get_peft_model(reference_model(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size / parameter.shape[-1] ** 0.5)
            elif "modules_to_save" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * parameter.std()
    model.save_pretrained(str(folder))
    return folder


@cache
def adapted_model(base: Path, adapter: Path) -> torch.nn.Module:
    """The checkpoint with the adapter, computed by peft in float32."""
    model: torch.nn.Module = PeftModel.from_pretrained(reference_model(base), str(adapter)).eval()
    return model


def expected_logprobs(base: Path, adapter: Path | None, ids: list[int]) -> Tensor:
    """[len(ids), vocab_size]"""
    model = reference_model(base) if adapter is None else adapted_model(base, adapter)
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)


def is_greedy(base: Path, adapter: Path | None, ids: list[int], output: list[int]) -> bool:
    """Whether every token of `output`, which follows `ids`, is the likeliest."""
    logprobs = expected_logprobs(base, adapter, [*ids, *output])
    return logprobs[len(ids) - 1 : -1].argmax(-1).tolist() == output
