"""The table of families, and what dtype auto means."""

from importlib import import_module
from pathlib import Path

import pytest

from quire.model_config import ARCHITECTURES, ModelConfig
from quire.models import registry
from tests.checkpoints import make_checkpoint


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_names_a_class(architecture: str) -> None:
    module, name = ARCHITECTURES[architecture].model.split(":")
    assert getattr(import_module(module), name).ignored_tensors


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_auto_keeps_the_checkpoint_s_dtype_where_its_product_is_fast(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.from_folder(make_checkpoint(tmp_path, "llama", dtype=stored))
    assert registry.resolve_dtype("float16", config) == "float16"
    monkeypatch.setattr(registry, "has_fbgemm", lambda: True)
    assert registry.resolve_dtype("auto", config) == stored
    monkeypatch.setattr(registry, "has_fbgemm", lambda: False)
    assert registry.resolve_dtype("auto", config) == "float32"
