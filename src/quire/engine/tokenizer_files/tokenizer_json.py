"""tokenizer.json: the `tokenizers` library's own file."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer

from quire.errors import CheckpointError


def read_tokenizer_json(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """Raises `CheckpointError` for a file that the library cannot read."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"{path} is not a tokenizer that the `tokenizers` library {tokenizers.__version__} can read: {error}"
        ) from error
