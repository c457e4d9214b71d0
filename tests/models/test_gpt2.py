"""Logits of GPT-2 equal those of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint, reference_model
from tests.paged_model import PagedModel


@pytest.mark.usefixtures("float_products")
@pytest.mark.parametrize(
    "overrides", [{}, {"tie_word_embeddings": False}, {"n_inner": 72, "activation_function": "gelu"}], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_chunks_and_decode_match_transformers(overrides: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt2", dtype=dtype, **overrides)
    ids = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = reference_model(folder)(torch.tensor([ids])).logits[0]
    model = PagedModel(folder, dtype)
    steps = [ids[:33], ids[33:34], ids[34:58], ids[58:59], ids[59:]]
    found = torch.cat([model.step({0: step})[0] for step in steps])
    assert (found - expected).abs().max().item() <= 2e-4


def test_bare_names_and_stored_masks_of_the_first_checkpoints(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt2")
    expected = PagedModel(folder).step({0: [1, 2, 3]})[0]
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 256, 256)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file)
    assert torch.equal(PagedModel(folder).step({0: [1, 2, 3]})[0], expected)
