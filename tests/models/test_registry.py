"""The table of families."""

from importlib import import_module

import pytest

from quire.model_config import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_names_a_class(architecture: str) -> None:
    module, name = ARCHITECTURES[architecture].model.split(":")
    assert getattr(import_module(module), name).ignored_tensors
