"""The attention function and the mask function that transformers asks for by name, over the paged cache.

A step's tokens of all sequences are one row with their positions. `computing` says which step runs, or that the model
is only looked at: then each token sees itself alone, and what each layer asks is recorded. What a mask lets a token see
is found by trying it, so that a layer that sees anything but all earlier tokens or a window of them is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quire.kernels import Kernels
from quire.layers.attention import Attention
from quire.layers.step_context import StepContext

NAME = "quire_paged"
"""The name of both functions in transformers' tables."""
_IGNORED = frozenset({"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states"})
_SPAN = 1 << 20
"""Distances at which a mask is tried. A window this wide is none."""
_OTHER = -1
"""What `_window_of` says of a mask that is no window."""


@dataclass(frozen=True, slots=True)
class Step:
    """What attention needs of one step."""

    context: StepContext
    kernels: Kernels
    dtype: torch.dtype
    """What the kernels compute in."""


@dataclass(slots=True)
class Visit:
    """A forward pass that only records what each layer asks of attention."""

    layers: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Layer → KV heads, elements of a key and of a value."""


_current: ContextVar[Step | Visit] = ContextVar("quire_step")


@contextmanager
def computing(step: Step | Visit) -> Iterator[None]:
    """What attention is computed for, until the end of the block."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def paged_mask(
    *_: Any, q_length: int, mask_function: Callable[..., Tensor], device: torch.device | str = "cpu", **options: Any
) -> Tensor | None:
    """transformers' mask function. None while a step runs, whose attention knows from its plan which keys a token sees;
    when the model is looked at, a mask whose elements are the width of the window (0: none)."""
    if isinstance(_current.get(), Step):
        return None
    return torch.full((1, 1, q_length, q_length), _window_of(mask_function), device=device)


def _window_of(visible: Callable[..., Tensor]) -> int:
    """How many tokens a token sees, itself included; 0: all before it; `_OTHER`: not the same number everywhere."""
    widths = set()
    for query in (_SPAN, _SPAN + 1):
        keys = torch.arange(query + 1, query - _SPAN, -1)
        zero = torch.zeros_like(keys)
        seen = torch.as_tensor(visible(zero, zero, zero + query, keys)).broadcast_to(keys.shape)
        width = int(seen[1:].sum())
        widths.add(width if not seen[0] and bool(seen[1 : width + 1].all()) else _OTHER)
    if len(widths) > 1:
        return _OTHER
    width = widths.pop()
    return 0 if width == _SPAN else width


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
    window, softcap, sinks = (options.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
    unknown = sorted(name for name, option in options.items() if option is not None and name not in _IGNORED)
    if unknown and options.get("is_causal") is not True:
        raise TypeError(f"its attention takes {', '.join(unknown)}, which the paged kernels do not have")
    layer, step = getattr(module, "layer_idx", None), _current.get()
    if not isinstance(layer, int):
        raise TypeError("its layers do not pass on what attention needs to find the cache")
    if isinstance(step, Visit):
        _check_mask(module, attention_mask, window or 0)
        if layer in step.layers:
            raise TypeError(f"layer {layer} asks for attention twice")
        step.layers[layer] = (key.shape[1], key.shape[3], value.shape[3])
        alone = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return alone.transpose(1, 2).contiguous(), None
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


def _check_mask(module: nn.Module, mask: Tensor | None, window: int) -> None:
    """Raise `TypeError` if a layer's mask lets a token see other keys than the layer's window does."""
    if getattr(module, "is_causal", True) is False:
        raise TypeError("its attention is not causal")
    if mask is None:
        return
    if mask.is_floating_point():
        raise TypeError("its layers change the mask of their attention")
    seen = int(mask.flatten()[0])
    if seen == _OTHER:
        raise TypeError("its attention is not causal, or goes by chunks")
    if seen != window:
        raise TypeError(f"a mask shows {seen or 'all'} tokens to a layer whose window is {window or 'all'}")
