"""TransformersModel: a decoder that Quire has no class for, computed by the transformers library on the paged cache.

Its attention is `quire.models.transformers_attention`. The only file that imports transformers, and only when such a
model is loaded. Before it runs it is looked at: its layers must ask for the attention that config.json was read as, and
tokens must meet nowhere else.
"""

import logging
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from quire.dtypes import DTYPE_BYTES
from quire.errors import CheckpointError, ConfigError
from quire.kernels import Kernels
from quire.layers.step_context import StepContext
from quire.model_config import ModelConfig
from quire.models import transformers_attention
from quire.models.pooler import Pooler
from quire.models.transformers_attention import Step, Visit, computing
from quire.models.vision.encoder import ImageEncoder
from quire.models.weights import WeightScope

logger = logging.getLogger(__name__)

_UNSUPPORTED_ROPES = ("dynamic", "longrope")
"""Rotary embeddings that transformers recomputes by the longest sequence of a step, which must not change others."""


class TransformersModel:
    """Satisfies `quire.models.registry.Model`."""

    pooler: Pooler | None = None
    ignored_tensors: tuple[str, ...] = (r"",)  # transformers accounts for all tensors itself
    image_encoder: ImageEncoder | None = None

    def __init__(
        self, config: ModelConfig, weights: WeightScope, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        if dtype not in DTYPE_BYTES:
            raise ConfigError(
                f"quantization is {dtype}, but {config.architecture} is computed by transformers, whose layers Quire "
                "does not quantise; leave it out"
            )
        self._kernels, self._dtype = kernels, weights.activation_dtype
        device = getattr(weights.source, "device", torch.device("cpu"))
        self._model = _load(config, getattr(torch, dtype)).to(device)
        name = _decoder_name(self._model)
        self._decoder = getattr(self._model, name)
        # What is left computes logits from hidden states, with the family's own factors and caps.
        setattr(self._model, name, _Given())
        self._check(config, device)
        logger.warning(
            "%s has no class in Quire: transformers computes it on the paged cache. Its layers are neither packed nor "
            "quantised and run operation by operation, so it is slower than a family of Quire's own",
            config.architecture,
        )

    def __call__(self, input_ids: Tensor, context: StepContext) -> Tensor:
        with computing(Step(context, self._kernels, self._dtype)):
            return context.select_output(self._hidden(input_ids, context.positions))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> [R, vocab_size]."""
        given = hidden[None].to(self._model.dtype)
        logits: Tensor = self._model(inputs_embeds=given, use_cache=False).logits[0]
        return logits.to(hidden.dtype)

    def scale_kv(self) -> None:
        """A model of transformers has no scales of keys and values."""
        raise ConfigError("kv_cache_dtype is fp8_e4m3, which models that transformers computes do not support")

    def _hidden(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """[T] -> [T, H]."""
        output = self._decoder(input_ids=input_ids[None].long(), position_ids=positions[None].long(), use_cache=False)
        hidden: Tensor = output.last_hidden_state[0].to(self._dtype)
        return hidden

    def _check(self, config: ModelConfig, device: torch.device) -> None:
        """Raise `CheckpointError` if the model does not ask for the attention that config.json was read as, or cannot
        run on the paged cache."""
        try:
            layers, meets = self._look(device)
        except Exception as error:  # the library raises many classes of its own
            reason = str(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{config.architecture} is not supported: {reason}") from error
        if away := config.num_layers - len(layers):
            raise CheckpointError(
                f"{config.architecture} is not supported: {away} of its {config.num_layers} layers have no attention"
            )
        wanted = (config.num_kv_heads, config.head_dim, config.head_dim)
        if set(layers.values()) != {wanted}:
            raise CheckpointError(
                f"{config.architecture} is not supported: its layers ask for attention with (KV heads, key, value "
                f"elements) {sorted(set(layers.values()))}; the cache has {wanted}"
            )
        if meets:
            raise CheckpointError(
                f"{config.architecture} is not supported: its tokens depend on others outside of attention, which the "
                "paged cache does not hold"
            )

    def _look(self, device: torch.device) -> tuple[dict[int, tuple[int, int, int]], bool]:
        """What each layer asks of attention, and whether tokens depend on others where each sees itself alone."""
        positions = torch.arange(3, dtype=torch.int32, device=device)
        hidden = []
        for first in (0, 1):
            visit = Visit()
            ids = torch.tensor([first, 1, 1], dtype=torch.int32, device=device)
            with computing(visit), torch.inference_mode():
                hidden.append(self._hidden(ids, positions).float())
                self.logits(hidden[-1].to(self._dtype))
        return visit.layers, not torch.allclose(hidden[0][1:], hidden[1][1:], rtol=1e-3, atol=1e-4)


def _decoder_name(model: Any) -> str:
    """The attribute of a model that computes hidden states."""
    prefix: str = model.base_model_prefix
    return prefix if hasattr(model, prefix) else "model"


class _Hidden:
    """The output of a decoder that only has hidden states."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        """Nothing, for outputs that some heads pass on: router logits, attentions …"""


class _Given(nn.Module):
    """Replaces the decoder by the hidden states that it is given, so that the head alone is computed."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Hidden:
        return _Hidden(inputs_embeds)


def _load(config: ModelConfig, dtype: torch.dtype) -> Any:
    """The library's model, with our attention. Raises `CheckpointError` for one that cannot take it."""
    transformers = import_module("transformers")
    modeling = import_module("transformers.modeling_utils")
    masks = import_module("transformers.masking_utils")
    name = transformers_attention.NAME
    modeling.AttentionInterface.register(name, transformers_attention.paged_attention)
    masks.AttentionMaskInterface.register(name, transformers_attention.paged_mask)
    try:
        settings = transformers.AutoConfig.from_pretrained(config.computed_by, local_files_only=True)
        family = transformers.AutoModelForCausalLM._model_mapping[type(settings)]
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{config.architecture} is not supported: neither Quire nor transformers {transformers.__version__} has it "
            f"({str(error).splitlines()[0]})"
        ) from error
    reason = _why_not(family, settings)
    if reason:
        raise CheckpointError(f"{config.architecture} is not supported: {reason}")
    try:
        model = family.from_pretrained(
            config.computed_by, config=settings, dtype=dtype, attn_implementation=name, local_files_only=True
        )
    except Exception as error:  # the library raises many classes of its own
        raise CheckpointError(f"transformers cannot load {config.computed_by}: {error}") from error
    return model.eval().requires_grad_(False)


def _why_not(family: Any, settings: Any) -> str:
    """Why a family cannot run on the paged cache; empty if it can."""
    if getattr(settings, "is_encoder_decoder", False):
        return "it has an encoder beside its decoder"
    if getattr(family, "_is_stateful", False):
        return "its layers keep a recurrent state"
    if not family._supports_attention_backend:
        return "its layers compute attention themselves instead of through the library's interface"
    ropes = getattr(settings, "rope_parameters", None) or {}
    kinds = {ropes.get("rope_type"), *(each.get("rope_type") for each in ropes.values() if isinstance(each, dict))}
    unsupported = [kind for kind in _UNSUPPORTED_ROPES if kind in kinds]
    if unsupported:
        return f"its rotary embedding ({unsupported[0]}) depends on other sequences"
    return ""
