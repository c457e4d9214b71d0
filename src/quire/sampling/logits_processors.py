"""Logits processors: Python code that changes logits before all other edits, for one request or for many together.

A request's own processors are callables in `SamplingParams.logits_processors`. A batch processor belongs to the
operator: it is registered with the engine, chooses the requests it wants, and gets all their rows together. Both work
on copies. So a processor that raises ends only the requests it was called for, and no other row changes.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.sampling.state import SamplingState
from quire.sampling_params import SamplingParams


class RowView(Protocol):
    """What a batch processor may read about the sequence of a row. It must change none of it."""

    @property
    def params(self) -> SamplingParams: ...
    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def output_token_ids(self) -> Sequence[int]:
        """Generated so far."""
        ...

    @property
    def sample_index(self) -> int:
        """Index among the request's n samples."""
        ...


@runtime_checkable
class BatchLogitsProcessor(Protocol):
    """A vectorised processor. It keeps no state of a row between steps: the `RowView` holds all it needs."""

    def wants(self, params: SamplingParams) -> bool:
        """True if it wants requests with these params. Called when the batch changes, not at every step."""
        ...

    def apply(self, logits: Tensor, rows: Sequence[RowView]) -> Tensor:
        """New logits [rows, vocabulary] float32; `logits` is a copy and may be changed and returned."""
        ...


class LogitsProcessing:
    """The rows of one batch that each processor is called for. Built once per batch."""

    def __init__(self, states: Sequence[SamplingState], batch_processors: Sequence[BatchLogitsProcessor]) -> None:
        self._states = states
        self._errors: dict[int, str] = {}
        self._batched: list[tuple[BatchLogitsProcessor, list[int]]] = []
        for processor in batch_processors:
            rows = [row for row, state in enumerate(states) if self._wants(processor, row, state.params)]
            if rows:
                self._batched.append((processor, rows))
        self._own = [
            (row, [(each, _takes_prompt(each)) for each in state.params.logits_processors])
            for row, state in enumerate(states)
            if state.params.logits_processors
        ]
        self.any = bool(self._errors or self._batched or self._own)
        """True if `apply` changes anything."""

    def apply(self, logits: Tensor) -> dict[int, str]:
        """Change `logits` [rows, vocabulary] in place. Returns row → error; a row with an error is set to NaN."""
        errors = dict(self._errors)
        for processor, all_rows in self._batched:
            rows = [row for row in all_rows if row not in errors]
            if not rows:
                continue
            try:
                given = logits[rows]
                logits[rows] = _checked(processor.apply(given, [self._states[row] for row in rows]), given)
            except Exception as error:
                errors |= dict.fromkeys(rows, _explain(processor, error))
        for row, processors in self._own:
            state = self._states[row]
            for call, takes_prompt in processors if row not in errors else ():
                prompt = (tuple(state.prompt_token_ids),) if takes_prompt else ()
                try:
                    given = logits[row].clone()
                    logits[row] = _checked(call(*prompt, tuple(state.output_token_ids), given), given)
                except Exception as error:
                    errors[row] = _explain(call, error)
                    break
        if errors:
            logits[list(errors)] = torch.nan
        return errors

    def _wants(self, processor: BatchLogitsProcessor, row: int, params: SamplingParams) -> bool:
        try:
            return row not in self._errors and processor.wants(params)
        except Exception as error:
            self._errors[row] = _explain(processor, error)
            return False


def load_processors(named: Sequence[object]) -> list[BatchLogitsProcessor]:
    """Batch processors from `module:Class` names and from processor objects, in the given order.

    Raises `ConfigError` for a class that cannot be imported or made without arguments, and for an object that is no
    processor.
    """
    return [_load(each) if isinstance(each, str) else _usable(each, repr(each)) for each in named]


def _load(name: str) -> BatchLogitsProcessor:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"logits_processors holds {name!r}; write package.module:Class")
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        raise ConfigError(
            f"the logits processor {name} cannot be loaded: {type(error).__name__}: {error}; it must be importable and "
            "be made without arguments"
        ) from error
    return _usable(made, name)


def _usable(made: Any, name: str) -> BatchLogitsProcessor:
    if isinstance(made, type) or not isinstance(made, BatchLogitsProcessor):
        raise ConfigError(f"the logits processor {name} has no methods wants(params) and apply(logits, rows)")
    return made


def _takes_prompt(call: Callable[..., Any]) -> bool:
    """vLLM's rule: a callable of three parameters gets the prompt's tokens first; one of two parameters does not."""
    try:
        return len(inspect.signature(call).parameters) == 3
    except (TypeError, ValueError):  # a builtin without a signature
        return False


def _checked(result: Any, given: Tensor) -> Tensor:
    if not isinstance(result, Tensor):
        raise TypeError(f"it returned {type(result).__name__}; it must return the logits, a tensor")
    if result.shape != given.shape:
        raise ValueError(f"it returned a tensor of shape {list(result.shape)}; the logits have {list(given.shape)}")
    return result


def _explain(processor: object, error: Exception) -> str:
    name = getattr(processor, "__name__", type(processor).__name__)
    return f"the logits processor {name} failed: {type(error).__name__}: {error}"
