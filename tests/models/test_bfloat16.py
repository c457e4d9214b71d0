"""In bfloat16 Quire is closer to transformers in float32 than transformers in bfloat16 is, whatever the processor
multiplies."""

from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_checkpoint, reference_model
from tests.paged_model import PagedModel


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "ministral3",
        "gpt2",
        "stablelm",
        "stablelm-parallel",
        "gemma2",
        "mixtral",
        "qwen2-moe",
        "qwen3-moe",
        "olmoe",
        "granite-moe",
        "glm4-moe",
        "phi3-longrope",
        "exaone4",
        "glm4",
        "gptj",
        "starcoder2",
        "gpt-bigcode",
        "gpt-neox",
        "bloom",
        "mpt-clipped",
        "falcon",
        "falcon-new",
        "falcon-rw",
        "phi-norms",
        "opt",
        "opt-350m",
    ],
)
def test_errors_are_smaller_than_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family, dtype="bfloat16")
    ids = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    oracle = reference_model(folder)
    with torch.inference_mode():
        truth = oracle(torch.tensor([ids])).logits[0]
        rounded = oracle.bfloat16()(torch.tensor([ids])).logits[0].float()
    model = PagedModel(folder, "bfloat16", kv_dtype=torch.bfloat16)
    found = torch.cat([model.step({0: ids[begin:end]})[0] for begin, end in ((0, 33), (33, 34), (34, 90))])
    # The median of tokens: rounding may send single tokens to another expert, here as there.
    assert (found - truth).abs().mean(1).median() < (rounded - truth).abs().mean(1).median()
