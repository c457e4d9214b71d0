"""read_config_file: where a model's config is: config.json of a folder, or the metadata of a GGUF file."""

from pathlib import Path
from typing import Any

from quire.errors import CheckpointError
from quire.gguf.file import is_gguf, read_gguf
from quire.model_config.config_json import read_json
from quire.model_config.file_kinds import is_file
from quire.model_config.folder_kinds import describe_missing
from quire.model_config.gguf_config import config_of


def read_config_file(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The config.json of a folder and its content. A GGUF file is its own."""
    path = Path(folder)
    if is_gguf(path):
        return path, config_of(read_gguf(path))
    path = path / "config.json"
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a Hugging Face checkpoint")
    if not is_file(path):
        raise CheckpointError(describe_missing(path))
    return path, read_json(path)
