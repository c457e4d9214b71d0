"""read_model: the model of a folder, for the task that the options ask for. `check_task` refuses other requests."""

from pathlib import Path

from quire.config import EngineConfig
from quire.engine.tokenizer import load_tokenizer
from quire.errors import RequestError
from quire.model_config import ModelConfig
from quire.request import Task

_JUDGEMENTS = ("no", "yes")
"""The answers of a decoder that scores pairs; their probability is that of the second among both."""
_PRODUCTS = {"embed": "embeddings", "classify": "classes", "score": "scores"}


def read_model(config: EngineConfig, folder: Path) -> ModelConfig:
    """Raises `CheckpointError` for a folder that cannot be read, `ConfigError` for a task that its model cannot have."""
    model = ModelConfig.from_folder(folder)
    if config.task == "auto" and config.pooling_type == "auto":
        return model
    token_ids: tuple[int, ...] = ()
    if config.task == "score" and model.pooling is None:
        tokenizer = load_tokenizer(config, folder)
        if tokenizer is not None:
            found = tokenizer.encode_all(_JUDGEMENTS, add_special_tokens=False)
            token_ids = tuple(ids[0] for ids in found if len(ids) == 1)
    return model.for_task(config.task, config.pooling_type, token_ids)


def check_task(model: ModelConfig, task: Task) -> None:
    """Raise `RequestError` for a request to generate of a model that makes vectors."""
    if task is Task.SAMPLE and model.pooling is not None:
        raise RequestError(
            f"this model makes {_PRODUCTS[model.task]}, it does not generate text: its task is {model.task!r}; send the "
            "request to a model that generates",
            param="model",
            code="wrong_task",
        )
