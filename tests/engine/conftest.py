"""The tokenizers of tests/data, unpacked once per run."""

import lzma
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from quire.engine.tokenizer import Tokenizer

TOKENIZERS = Path(__file__).parents[1] / "data" / "tokenizers"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name in tests/data/tokenizers → a folder as a model has it."""

    @cache
    def unpacked(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        (folder / "tokenizer.json").write_bytes(lzma.decompress((TOKENIZERS / name / "tokenizer.json.xz").read_bytes()))
        shutil.copy(TOKENIZERS / name / "tokenizer_config.json", folder)
        return folder

    return unpacked


@pytest.fixture(scope="session")
def load_tokenizer(tokenizer_folder: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    """Name in tests/data/tokenizers → Tokenizer."""

    @cache
    def load(name: str) -> Tokenizer:
        return Tokenizer.from_folder(tokenizer_folder(name))

    return load
