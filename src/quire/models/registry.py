"""load_model: build the model of a config, and account for every weight.

The table of families is `quire.model_config.ARCHITECTURES`; a row's class is imported when a checkpoint needs it.
"""

from importlib import import_module
from typing import Protocol

from torch import Tensor

from quire.kernels import Kernels
from quire.kernels.interface import Packing
from quire.layers.adapters import ModelAdapters
from quire.layers.pipe import Pipe
from quire.layers.step_context import StepContext
from quire.model_config import ARCHITECTURES, ModelConfig
from quire.models.decoder import Decoder
from quire.models.packed_checkpoint import PackedCheckpoint
from quire.models.pooler import Pooler, make_pooler
from quire.models.shards import Shards
from quire.models.stored_names import StoredNames
from quire.models.vision.encoder import ImageEncoder
from quire.models.weights import TensorSource, WeightScope

FALLBACK = ("quire.models.transformers_model", "TransformersModel")
"""The class of models without a row; see `quire.model_config.fallback`."""


class Model(Protocol):
    """What the runner asks of a model. Indices are int32; activations have the weights' `activation_dtype`."""

    pooler: Pooler | None
    """What makes vectors of hidden states; None: the last hidden state is the vector."""
    ignored_tensors: tuple[str, ...]
    """Patterns of tensors that a checkpoint may hold and the model does not use."""
    image_encoder: ImageEncoder | None
    """None for a model that reads text only."""

    def __call__(self, input_ids: Tensor, context: StepContext) -> Tensor:
        """input_ids [T] -> hidden [T, H], or [R, H] of the step's output tokens, the final norm applied; writes the KV
        of the T tokens."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> [R, vocab_size]."""
        ...

    def scale_kv(self) -> None:
        """Scale keys and values for a cache of float8 from now on."""
        ...


BUFFERS = r"(^|\.)(rotary_emb\.\w+|rope\.freqs|masked_bias|position_ids|_extra_state)$"
"""Names of what modules keep beside their weights and checkpoints of older years hold: tables that follow from the
config, masks, positions."""


def load_model(
    config: ModelConfig,
    source: TensorSource,
    kernels: Kernels,
    dtype: str,
    *,
    packing: Packing | None = None,
    adapters: ModelAdapters | None = None,
    shards: Shards | None = None,
    pipe: Pipe | None = None,
    max_model_len: int | None = None,
) -> Model:
    """Build the model from its weights, packed as `dtype`: a float type, or the name of a quantisation.

    Positions run up to `max_model_len`, by default the config's `default_model_len`. `packing` packs the dense layers;
    by default `kernels` do. `adapters` collects the layers that adapters may change. With `shards`, `config` is that of
    one rank's part; with `pipe` it has a stage, whose layers alone are built. Raises `CheckpointError` for weights that
    are missing, misshapen or left over.
    """
    row = ARCHITECTURES.get(config.architecture)
    if config.computed_by or row is None:
        module, name = FALLBACK
    else:
        module, name = row.model.split(":")
    family = getattr(import_module(module), name)
    if isinstance(source, PackedCheckpoint):
        packing = source.packing_for(dtype)
    weights = WeightScope(StoredNames(source), packing=packing, adapters=adapters, shards=shards)
    model: Model = family(config, weights, kernels, dtype, max_model_len or config.default_model_len)
    ignored = (*model.ignored_tensors, BUFFERS)
    if pipe is not None:
        assert isinstance(model, Decoder), "only decoders are cut into stages"
        model.pipe = pipe
        ignored = (*ignored, *pipe.stage.others_tensors())
    if pipe is None or pipe.stage.is_last:
        model.pooler = make_pooler(config, weights, model.logits)
    source.finish(ignored=ignored)
    return model
