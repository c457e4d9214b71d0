"""find_architecture: the row of ARCHITECTURES for a config.json.

transformers' AutoModelForCausalLM goes by `model_type` and reads `architectures` as a note. Quire goes by the first
name of `architectures` that has a row; a file without such a name (null, a bare model such as LlamaModel, an old
spelling) means the causal model of its `model_type`. The name of another task, such as LlamaForSequenceClassification,
is refused, since its head makes no tokens; transformers would make a random head. A classifier is the model of its
decoder with another head. An encoder's rows are named after all models that Quire can make of its layers.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quire.errors import CheckpointError
from quire.model_config.architectures import ARCHITECTURES
from quire.model_config.encoder_architectures import ENCODER_ARCHITECTURES

logger = logging.getLogger(__name__)

_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_MODEL_TYPES = {"gemma3_text": "Gemma3ForCausalLM"}
"""Types whose name does not follow from that of the architecture."""


def find_architecture(path: Path, config: dict[str, Any]) -> str:
    """The row's name. Raises `CheckpointError` for a config.json, read from `path`, that means none."""
    found = known_architecture(path, config)
    if found is not None:
        return found
    named = config.get("architectures") or ()
    shown = ", ".join([named] if isinstance(named, str) else named) or f"none (model_type {config.get('model_type')!r})"
    raise CheckpointError(f"{path}: architectures is {shown}; supported are {', '.join(ARCHITECTURES)}")


def known_architecture(path: Path, config: dict[str, Any]) -> str | None:
    """The row's name; None where Quire has no row. Raises `CheckpointError` if `architectures` is no list of names."""
    named = config.get("architectures") or []
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{path}: architectures is {json.dumps(named)}; supported: a list of names")
    for name in named:
        if name in ARCHITECTURES:
            _warn_of_other_type(path, name, config)
            return str(name)
        stem, classifies, _ = name.partition("ForSequenceClassification")
        if classifies and (rows := [stem + end for end in _CAUSAL_ENDINGS if stem + end in ARCHITECTURES]):
            return str(rows[0])
    model_type = config.get("model_type")
    if isinstance(model_type, str) and not any(map(_is_other_task, named)):
        return _causal_architecture(model_type, config) or _encoder_architecture(model_type)
    return None


def _warn_of_other_type(path: Path, name: str, config: dict[str, Any]) -> None:
    """Warn where `model_type` means another family, which transformers would load."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or _letters(_stem(name)) == _letters(model_type):
        return
    meant = _causal_architecture(model_type, config)
    if meant not in (None, name):
        logger.warning(
            "%s: architectures is %s, and model_type %r means %s; Quire goes by architectures, transformers by "
            "model_type; correct the wrong one",
            path,
            name,
            model_type,
            meant,
        )


def is_causal(name: str) -> bool:
    """Whether an architecture's name is that of a model that continues texts."""
    return name.endswith(_CAUSAL_ENDINGS[:2])


def _causal_architecture(model_type: str, config: dict[str, Any]) -> str | None:
    if model_type in _MODEL_TYPES:
        return _MODEL_TYPES[model_type]
    wanted = _letters(model_type)
    rows = [name for name in ARCHITECTURES if _letters(_stem(name)) == wanted]
    # A type may mean a model that reads more than text, whose text model is a section of the file.
    fitting = [name for name in rows if not ARCHITECTURES[name].section or ARCHITECTURES[name].section in config]
    return max(fitting, key=lambda name: bool(ARCHITECTURES[name].section), default=None)


def _encoder_architecture(model_type: str) -> str | None:
    models = (name for name in ENCODER_ARCHITECTURES if name.endswith("Model"))
    return next((name for name in models if _letters(name.removesuffix("Model")) == _letters(model_type)), None)


def _stem(name: str) -> str:
    return next((name.removesuffix(ending) for ending in _CAUSAL_ENDINGS if name.endswith(ending)), name)


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def _is_other_task(name: str) -> bool:
    return "For" in name and not name.endswith(_CAUSAL_ENDINGS)


def architectures_of(model_types: Iterable[str]) -> dict[str, str]:
    """Model type → name of its row, for each of `model_types` that has a row."""
    found = {model_type: _causal_architecture(model_type, {}) for model_type in model_types}
    return {model_type: name for model_type, name in found.items() if name is not None}
