"""TransformersModel: a decoder that Quire has no class for, computed by the transformers library on the paged cache.

transformers asks an attention function by name; ours writes keys and values to the cache and attends to the cache, as
`quire.layers.attention` does. A step's tokens of all sequences are one row with their positions. The only file that
imports transformers, and only when such a model is loaded.
"""

import logging
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from quire.dtypes import DTYPE_BYTES
from quire.errors import CheckpointError, ConfigError
from quire.kernels import Kernels
from quire.layers.attention import Attention
from quire.layers.step_context import StepContext
from quire.model_config import ModelConfig
from quire.models.vision.encoder import ImageEncoder
from quire.models.weights import WeightScope

logger = logging.getLogger(__name__)

ATTENTION = "quire_paged"
"""The name of our attention function in transformers' table."""
_UNSUPPORTED_ROPES = ("dynamic", "longrope")
"""Rotary embeddings that transformers recomputes by the longest sequence of a step, which must not change others."""
_IGNORED = frozenset({"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states"})


@dataclass(frozen=True, slots=True)
class _Step:
    """What attention needs of one step."""

    context: StepContext
    kernels: Kernels
    dtype: torch.dtype
    """What the kernels compute in."""


class _Visit:
    """A forward pass that only records what each layer's attention gets."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[int, int, int]] = {}
        """Layer → KV heads, elements of a key and of a value."""


class TransformersModel:
    """Satisfies `quire.models.registry.Model`."""

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
        self._check(config, device)
        name = self._model.base_model_prefix
        self._decoder = getattr(self._model, name)
        # What is left computes logits from hidden states, with the family's own factors and caps.
        setattr(self._model, name, _Given())
        logger.warning(
            "%s has no class in Quire: transformers computes it on the paged cache. Its layers are neither packed nor "
            "quantised and run operation by operation, so it is slower than a family of Quire's own",
            config.architecture,
        )

    def __call__(self, input_ids: Tensor, context: StepContext) -> Tensor:
        step = _Step(context, self._kernels, self._dtype)
        return context.select_output(self._hidden(input_ids, context.positions, step))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> [R, vocab_size]."""
        given = hidden[None].to(self._model.dtype)
        logits: Tensor = self._model(inputs_embeds=given, use_cache=False).logits[0]
        return logits.to(hidden.dtype)

    def scale_kv(self) -> None:
        """A model of transformers has no scales of keys and values."""
        raise ConfigError("kv_cache_dtype is fp8_e4m3, which models that transformers computes do not support")

    def _hidden(self, input_ids: Tensor, positions: Tensor, step: object) -> Tensor:
        """[T] -> [T, H]."""
        output = self._decoder(
            input_ids=input_ids[None].long(),
            position_ids=positions[None].long(),
            use_cache=False,
            quire_step=step,
        )
        hidden: Tensor = output.last_hidden_state[0].to(self._dtype)
        return hidden

    def _check(self, config: ModelConfig, device: torch.device) -> None:
        """Raise `CheckpointError` if the model's attention is not what config.json was read as."""
        self._decoder = getattr(self._model, self._model.base_model_prefix)
        visit, zero = _Visit(), torch.zeros(1, dtype=torch.int32, device=device)
        try:
            self._hidden(zero, zero, visit)
        except TypeError as error:
            raise CheckpointError(f"{config.architecture} is not supported: {error}") from error
        wanted = dict.fromkeys(range(config.num_layers), (config.num_kv_heads, config.head_dim, config.head_dim))
        if visit.layers != wanted:
            found = sorted(set(visit.layers.values()))
            raise CheckpointError(
                f"{config.architecture} is not supported: {len(visit.layers)} layers ask for attention with (KV heads, "
                f"key, value elements) {found}; the cache has {config.num_layers} layers of "
                f"{config.num_kv_heads, config.head_dim, config.head_dim}"
            )


class _Given(nn.Module):
    """Replaces the decoder by the hidden states that it is given, so that the head alone is computed."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Any:
        outputs = import_module("transformers.modeling_outputs")
        return outputs.BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def _load(config: ModelConfig, dtype: torch.dtype) -> Any:
    """The library's model, with our attention. Raises `CheckpointError` for one that cannot take it."""
    transformers = import_module("transformers")
    modeling = import_module("transformers.modeling_utils")
    masks = import_module("transformers.masking_utils")
    modeling.AttentionInterface.register(ATTENTION, paged_attention)
    masks.AttentionMaskInterface.register(ATTENTION, _no_mask)
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
            config.computed_by, config=settings, dtype=dtype, attn_implementation=ATTENTION, local_files_only=True
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


def _no_mask(*arguments: Any, **options: Any) -> None:
    """Our attention knows from its plan which keys a token sees."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function. query [1, num_heads, T, D], key and value [1, num_kv_heads, T, D] ->
    [1, T, num_heads, D]. Raises `TypeError` for options that the kernels do not have."""
    step = options.pop("quire_step", None)
    window, softcap, sinks = (options.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
    unknown = sorted(name for name, option in options.items() if option is not None and name not in _IGNORED)
    if unknown and options.get("is_causal") is not True:
        raise TypeError(f"its attention takes {', '.join(unknown)}, which the paged kernels do not have")
    if getattr(module, "is_causal", True) is False or attention_mask is not None:
        raise TypeError("its attention is not causal")
    layer = getattr(module, "layer_idx", None)
    if step is None or not isinstance(layer, int):
        raise TypeError("its layers do not pass on what attention needs to find the cache")
    if isinstance(step, _Visit):
        if layer in step.layers:
            raise TypeError(f"layer {layer} asks for attention twice")
        step.layers[layer] = (key.shape[1], key.shape[3], value.shape[3])
        return query.transpose(1, 2), None
    assert isinstance(step, _Step)
    q, k, v = (x[0].transpose(0, 1).to(step.dtype).contiguous() for x in (query, key, value))
    context = step.context.for_inner_layers
    plan = context.attention[context.kv_layers[layer].group]
    if plan.window and not 0 < (window or 0) <= plan.window:
        seen = f"a window of {window}" if window else "all positions"
        raise TypeError(f"layer {layer} attends to {seen}, but config.json gives it a window of {plan.window}")
    attend = Attention(
        step.kernels,
        layer,
        scale=scaling or q.shape[-1] ** -0.5,
        window=window or 0,
        softcap=softcap or 0.0,
        sinks=None if sinks is None else sinks.float(),
    )
    return attend(q, k, v, context)[None].to(query.dtype), None
