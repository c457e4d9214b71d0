"""PoolingConfig: how the hidden states of a text become one vector, read from a model's folder.

A folder of sentence-transformers says so in modules.json. A classifier's config.json names its labels. Other encoders
take the mean of all tokens, as sentence-transformers does with them. A decoder makes vectors only where its folder or
the option `task` says so.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from quire.errors import CheckpointError, ConfigError
from quire.model_config.config_json import read_json
from quire.request import POOLINGS

Task = Literal["generate", "embed", "classify", "score"]
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
"""Flags of a Pooling module, in the order in which sentence-transformers joins several."""
_MODES = {"lasttoken": "last", "weightedmean": "weighted_mean", "mean_sqrt_len_tokens": "mean_sqrt_len"}
_ACTIVATIONS = {"Identity": "", "Tanh": "tanh", "GELU": "gelu", "ReLU": "relu", "SiLU": "silu", "Sigmoid": "sigmoid"}


class DenseModule(NamedTuple):
    """A Dense module of sentence-transformers, which maps the pooled vector."""

    folder: str
    num_inputs: int
    num_outputs: int
    has_bias: bool
    activation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingConfig:
    """What follows the last layer for a text as a whole."""

    task: Task
    methods: tuple[str, ...] = ("mean",)
    """Names of POOLINGS; the vectors of several are joined."""
    dense: tuple[DenseModule, ...] = ()
    normalize: bool = True
    """Vectors have length 1 unless a request says otherwise."""
    num_labels: int = 0
    """Outputs of a classification head; 0: there is none."""
    labels: tuple[str, ...] = ()
    activation: Literal["softmax", "sigmoid", ""] = ""
    """What makes probabilities of the head's outputs; "": they are scores as they are."""
    token_ids: tuple[int, ...] = ()
    """Tokens whose logits are the outputs: those of no and yes (Qwen3-Reranker)."""
    matryoshka_dimensions: tuple[int, ...] = ()
    """The sizes to which vectors may be cut; empty: to any."""

    def vector_size(self, hidden_size: int) -> int:
        """Numbers of an embedding."""
        return self.dense[-1].num_outputs if self.dense else hidden_size * len(self.methods)

    @property
    def reads_all_tokens(self) -> bool:
        """Whether hidden states of tokens before the last are needed."""
        return self.methods != ("last",)


def read_pooling(path: Path, values: dict[str, Any], architecture: str, *, is_encoder: bool) -> PoolingConfig | None:
    """The pooling of the model whose config.json `path` holds `values`; None: the model generates.

    Raises `CheckpointError` for modules that Quire does not compute.
    """
    named = next(iter(values.get("architectures") or ()), architecture)
    if named.endswith("ForSequenceClassification"):
        return _classifier(path, values, is_encoder)
    modules = path.parent / "modules.json"
    if modules.is_file():
        found = _read_modules(modules)
        sizes = values.get("matryoshka_dimensions") or ()
        return replace(found, matryoshka_dimensions=tuple(sizes))
    return PoolingConfig(task="embed") if is_encoder else None


def with_task(
    pooling: PoolingConfig | None, task: str, pooling_type: str, token_ids: tuple[int, ...]
) -> PoolingConfig | None:
    """The pooling that the options `task` and `pooling_type` ask for; None: the model generates. `token_ids` are those
    of no and yes. Raises `ConfigError` for a task that the model's head does not have."""
    own: Task = "generate" if pooling is None else pooling.task
    if task == "score" and pooling is None:
        if len(token_ids) != 2:
            raise ConfigError(
                "task is 'score', for which a decoder's vocabulary must hold the tokens yes and no; use task embed"
            )
        pooling = PoolingConfig(task="score", methods=("last",), num_labels=2, token_ids=token_ids)
    elif task == "embed" and pooling is None:
        pooling = PoolingConfig(task="embed", methods=("last",))
    elif task == "score" and own == "embed":
        pass  # texts are scored by the cosine of their vectors
    elif task == "classify" and own == "score" and pooling is not None:
        pooling = replace(pooling, task="classify")
    elif task not in ("auto", own):
        raise ConfigError(f"task is {task!r}, but the model's folder is one for the task {own!r}; leave the option out")
    if pooling_type == "auto":
        return pooling
    if pooling is None or pooling.task != "embed":
        raise ConfigError(
            f"pooling_type is {pooling_type!r}, but this model makes no embeddings; use it with task embed"
        )
    return replace(pooling, methods=(pooling_type,))


def _classifier(path: Path, values: dict[str, Any], is_encoder: bool) -> PoolingConfig:
    labels = values.get("id2label")
    if not isinstance(labels, dict) or not labels:
        labels = {index: f"LABEL_{index}" for index in range(values.get("num_labels") or 2)}
    try:
        names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    except ValueError:
        raise CheckpointError(f"{path}: id2label has the keys {list(labels)[:5]}; supported: numbers") from None
    own = values.get("sentence_transformers") or {}
    named = str(own.get("activation_fn") or values.get("sbert_ce_default_activation_function") or "")
    several = values.get("problem_type") == "multi_label_classification"
    method = str(values.get("classifier_pooling") or "cls") if is_encoder else "last"
    if method not in ("cls", "mean", "last"):
        raise CheckpointError(f"{path}: classifier_pooling is {method!r}; supported: cls, mean")
    return PoolingConfig(
        task="score" if len(names) == 1 else "classify",
        methods=(method,),
        normalize=False,
        num_labels=len(names),
        labels=names,
        activation="" if named.endswith("Identity") else "sigmoid" if several or len(names) == 1 else "softmax",
    )


def _read_modules(path: Path) -> PoolingConfig:
    """The modules of sentence-transformers after the transformer itself."""
    try:
        modules = json.loads(path.read_text())
        kinds = [(str(module["type"]).rsplit(".", 1)[-1], path.parent / module["path"]) for module in modules]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no list of modules of sentence-transformers: {error!r}") from error
    found = PoolingConfig(task="embed", normalize=False)
    for kind, folder in kinds:
        if kind == "Transformer":
            continue
        if kind == "Pooling":
            found = replace(found, methods=_read_methods(folder / "config.json"))
        elif kind == "Dense":
            found = replace(found, dense=(*found.dense, _read_dense(folder)))
        elif kind == "LogitScore":
            found = replace(found, task="score", methods=("last",), num_labels=2, token_ids=_read_judgements(folder))
        elif kind == "Normalize":
            found = replace(found, normalize=True)
        else:
            raise CheckpointError(f"{path}: the module {kind} is not supported; there is Pooling, Dense, Normalize")
    return found


def _read_methods(path: Path) -> tuple[str, ...]:
    values = read_json(path)
    if values.get("include_prompt") is False:
        raise CheckpointError(f"{path}: include_prompt is false; supported: true, the prompt counts for the vector")
    mode = values.get("pooling_mode")
    if mode is not None:
        modes = [mode] if isinstance(mode, str) else list(mode)
        methods = tuple(_MODES.get(name, name) for name in modes)
    else:
        methods = tuple(method for flag, method in _LEGACY_MODES.items() if values.get(flag))
    if not methods or any(method not in POOLINGS for method in methods):
        raise CheckpointError(f"{path}: pooling_mode is {mode or 'missing'}; supported are {', '.join(POOLINGS)}")
    return methods


def _read_judgements(folder: Path) -> tuple[int, int]:
    """The tokens of no and yes of a decoder that scores pairs."""
    path = folder / "config.json"
    values = read_json(path)
    false, true = values.get("false_token_id"), values.get("true_token_id")
    if not isinstance(false, int) or not isinstance(true, int):
        raise CheckpointError(f"{path}: false_token_id is {false} and true_token_id {true}; supported: two token ids")
    return false, true


def _read_dense(folder: Path) -> DenseModule:
    path = folder / "config.json"
    values = read_json(path)
    name = str(values.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"{path}: activation_function is {name}; supported are {', '.join(_ACTIVATIONS)}")
    sizes = values.get("in_features"), values.get("out_features")
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CheckpointError(f"{path}: in_features and out_features are {sizes}; supported: numbers above 0")
    return DenseModule(str(folder), sizes[0], sizes[1], bool(values.get("bias", True)), _ACTIVATIONS[name])  # type: ignore[arg-type]


def read_max_length(folder: Path) -> int | None:
    """The longest text in tokens by sentence_bert_config.json; None where the folder has none."""
    path = folder / "sentence_bert_config.json"
    found = read_json(path).get("max_seq_length") if path.is_file() else None
    if found is not None and (not isinstance(found, int) or found < 1):
        raise CheckpointError(f"{path}: max_seq_length is {found!r}; supported: a number of tokens above 0")
    return found
