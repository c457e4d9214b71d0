"""AdapterRows: which rows of a step use which adapter, found once per step for all layers."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from quire.kernels.lora import LoraRows
from quire.kernels.transfer import send
from quire.layers.adapters import ModelAdapters, StepRows
from quire.runner.request_rows import RequestRows
from quire.runner.step_inputs import SentInputs, StepInputs

NO_ADAPTER = -1
Int32Array = NDArray[np.int32]


class AdapterRows:
    """Tells a model's layers what of a step uses adapters. The only writer of `ModelAdapters.step`."""

    def __init__(self, adapters: ModelAdapters, rows: RequestRows, tile: int, device: torch.device) -> None:
        """`tile`: the kernels' LORA_TILE."""
        self._adapters = adapters
        self._rows = rows
        self._tile = tile
        self._device = device
        self._slots: Int32Array = np.zeros(0, dtype=np.int32)
        """The slot of each token of the step, or `NO_ADAPTER`; empty if none has one."""
        self._step: StepRows | None = None

    def begin(self, step: StepInputs) -> bool:
        """Note a step that was laid out. Returns whether a row of it uses an adapter. A step that repeats the one
        before has the same rows."""
        if not step.repeats:
            slots = self._rows.adapter_slots[step.plan.rows]
            used = bool((slots != NO_ADAPTER).any())
            self._slots = np.repeat(slots, step.plan.num_scheduled_tokens) if used else slots[:0]
            self._step = None
        self._adapters.step = None
        return len(self._slots) > 0

    def enter_model(self, sent: SentInputs) -> None:
        """Before the model: its layers compute all tokens, the last one those that are selected."""
        if not len(self._slots):
            return
        if self._step is None:
            computed = [self._slots]
            if sent.selection is not None:
                computed.append(self._slots[sent.selection.tokens])
            self._step = self._step_of(computed)
        self._adapters.step = self._step

    def enter_head(self, tokens: Int32Array | None = None) -> None:
        """Before the head: its rows are those of some tokens of the step; None: of all of them."""
        head, step = self._adapters.head, self._step
        if step is None or head is None or not step.slots & head.touched:
            self._adapters.step = None
        elif tokens is None:
            self._adapters.step = step
        else:
            self._adapters.step = self._step_of([self._slots[tokens]])

    def leave(self) -> None:
        """What is computed next uses no adapter."""
        self._adapters.step = None

    def _step_of(self, computed: Sequence[Int32Array]) -> StepRows | None:
        """From the slots of the rows that a layer computes, for each number of rows."""
        used = set(np.unique(computed[0]).tolist()) - {NO_ADAPTER}
        bits = sum(1 << slot for slot in used)
        return StepRows({len(slots): self._group(slots) for slots in computed}, bits) if used else None

    def _group(self, slots: Int32Array) -> LoraRows:
        rows = np.flatnonzero(slots != NO_ADAPTER).astype(np.int32)
        rows = rows[np.argsort(slots[rows], kind="stable")]
        ordered = slots[rows]
        starts = np.flatnonzero(np.diff(ordered, prepend=NO_ADAPTER)).tolist()
        groups = [
            (int(ordered[begin]), begin, end) for begin, end in zip(starts, [*starts[1:], len(rows)], strict=True)
        ]
        tiles = [
            (slot, first, min(first + self._tile, end))
            for slot, begin, end in groups
            for first in range(begin, end, self._tile)
        ]
        are_all = len(rows) == len(slots) and bool((np.diff(rows) > 0).all())
        arrays = {"rows": rows, "tiles": np.array(tiles, dtype=np.int32).reshape(-1, 3)}
        sent = send(arrays, self._device)
        return LoraRows(sent["rows"], sent["tiles"], groups, are_all)
