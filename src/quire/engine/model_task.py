"""read_model: the model of a folder, for the task that the options ask for. `check_task` refuses other requests."""

from pathlib import Path

from quire.config import EngineConfig
from quire.embeddings import check_dimensions
from quire.engine.checkpoint import read_model_config
from quire.errors import RequestError
from quire.model_config import ModelConfig
from quire.request import Task

_JUDGEMENTS = ("no", "yes")
"""The answers of a decoder that scores pairs; their probability is that of the second among both."""
_PRODUCTS = {"embed": "embeddings", "classify": "classes", "score": "scores"}


def read_model(config: EngineConfig, folder: Path) -> ModelConfig:
    """Raises `CheckpointError` for a folder that cannot be read, `ConfigError` for a task that its model lacks."""
    model = read_model_config(folder)
    if config.task == "auto" and config.pooling_type == "auto":
        return model
    token_ids: tuple[int, ...] = ()
    if config.task == "score" and model.pooling is None:
        from quire.engine.tokenizer import load_tokenizer  # the engine process has no other use for text

        tokenizer = load_tokenizer(config, folder)
        if tokenizer is not None:
            found = tokenizer.encode_all(_JUDGEMENTS, add_special_tokens=False)
            token_ids = tuple(ids[0] for ids in found if len(ids) == 1)
    return model.for_task(config.task, config.pooling_type, token_ids)


def check_embeds(model: ModelConfig) -> None:
    """Raise `RequestError` unless the model makes embeddings. A decoder does, unless its task is generate by option."""
    if model.generates_only or model.task not in ("generate", "embed"):
        raise _wrong_task(model, "an embedding model")


def check_dimensions_of(model: ModelConfig, dimensions: int | None) -> None:
    """Raise `RequestError` for a size of embeddings that the model does not make."""
    pooling = model.pooling
    if dimensions is None:
        return
    if pooling is None:
        check_dimensions(dimensions, model.hidden_size)
    else:
        check_dimensions(dimensions, pooling.vector_size(model.hidden_size), pooling.matryoshka_dimensions)


def check_classifies(model: ModelConfig) -> None:
    """Raise `RequestError` unless the model has a classification head."""
    if model.pooling is None or not model.pooling.num_labels or model.pooling.token_ids:
        raise _wrong_task(model, "a classifier (ForSequenceClassification)")


def check_scores(model: ModelConfig) -> None:
    """Raise `RequestError` unless the model scores pairs."""
    if model.task not in ("embed", "score"):
        raise _wrong_task(model, "a cross-encoder with one label, a reranker or an embedding model")


def _wrong_task(model: ModelConfig, wanted: str) -> RequestError:
    return RequestError(
        f"this model's task is {model.task!r}; the request needs {wanted}", param="model", code="wrong_task"
    )


def check_task(model: ModelConfig, task: Task) -> None:
    """Raise `RequestError` for a request to generate of a model that makes vectors."""
    if task is Task.SAMPLE and model.pooling is not None:
        raise RequestError(
            f"this model makes {_PRODUCTS[model.task]}, it does not generate text: its task is {model.task!r}; send "
            "the request to a model that generates",
            param="model",
            code="wrong_task",
        )
