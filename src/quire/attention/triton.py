"""The planner for a GPU: turns a step's ragged sequences into work lists, once, for every layer to run.

An item is a run of new tokens of one sequence with a range of its keys. A program of the kernel takes an item for one
KV head, whose query heads share each key that is read. Long ranges are cut, so that the whole GPU has work however
ragged the batch is, and a second kernel merges the parts (`gpu_items`). Keys that many sequences begin with are read
once for all of them where that pays (`gpu_sharing`).

All that a step's kernels read goes to the device as one int32 array, in one copy, into memory that never moves
(`plan_buffers`). A CUDA graph captured with one plan can be replayed with another if both have the same
`captured_tokens` and the same `variant`: these bound the number of programs, and surplus programs return at once.
Variants differ in the rows of a program; rows of 0 mean that there are no programs for shared keys.

Nothing here imports Triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quire.attention.gpu_items import NO_ITEMS, Geometry, Splitter
from quire.attention.gpu_sharing import NO_SHARERS, NOTHING_GATHERED, share_prefixes
from quire.attention.inputs import Int32Array, StepArrays
from quire.attention.plan_buffers import COUNT_STRIDE, PlanBuffers
from quire.backends import MAX_NARROW_TOKENS
from quire.kernels.gpu_plan import NUM_ITEM_COLUMNS, GatheredColumn, GpuAttentionPlan, MergeColumn, WorkList
from quire.kernels.interface import Variant

__all__ = ["GpuAttentionPlan", "PlanBuffers", "plan_attention"]


@dataclass(frozen=True, slots=True)
class _Work:
    """A step's items and merges on the host, and the rows of a program of each kind of item."""

    narrow: Int32Array
    wide: Int32Array
    shared: Int32Array
    gathered: Int32Array
    merges: Int32Array
    narrow_rows: int
    wide_rows: int
    shared_rows: int


def plan_attention(
    step: StepArrays, buffers: PlanBuffers, *, window: int = 0, captured_tokens: int = 0, variant: Variant = ()
) -> GpuAttentionPlan:
    """Plan one step and send the plan to the device. A new token's keys are written before the plan runs. A plan made
    for a window serves layers with this window or a smaller one.

    `captured_tokens` > 0 plans for a CUDA graph with room for this many tokens, of sequences with up to
    MAX_NARROW_TOKENS new ones each: the plan has a slot for every token of the graph, -1 for those that the step has
    not, and launches that depend on its variant alone. A `variant` is given for such a plan without sequences.
    """
    _check(step, buffers, captured_tokens)
    work = _divide(step, buffers, window, captured_tokens, variant)
    _send(step, work, buffers, captured_tokens)
    return _view_plan(step, work, buffers, window, captured_tokens)


def _check(step: StepArrays, buffers: PlanBuffers, captured_tokens: int) -> None:
    num_tokens, block_size = len(step.slots), buffers.shape.block_size
    if step.block_tables.shape[1] * block_size < step.seq_lens.max(initial=0):
        raise ValueError(
            f"block_tables has room for {step.block_tables.shape[1]} blocks of {block_size}, "
            f"too few for a sequence of {step.seq_lens.max()} tokens"
        )
    if captured_tokens:
        most = int(np.diff(step.query_start_loc).max(initial=0))
        if num_tokens > captured_tokens or most > MAX_NARROW_TOKENS:
            raise ValueError(
                f"{num_tokens} new tokens, up to {most} of one sequence, do not fit a graph of "
                f"{captured_tokens} tokens, up to {MAX_NARROW_TOKENS} of one"
            )


def _divide(step: StepArrays, buffers: PlanBuffers, window: int, captured_tokens: int, variant: Variant) -> _Work:
    """Cut the step into items."""
    query_lens = np.diff(step.query_start_loc)
    narrow = query_lens <= MAX_NARROW_TOKENS
    narrow_rows = buffers.rows_for(int(query_lens[narrow].max(initial=1)) * buffers.group)
    shared_rows = 0
    if variant:
        narrow_rows, shared_rows = variant
    wide_rows = buffers.rows_for(max(64, int(query_lens.max(initial=0)) * buffers.group))

    geometry, splitter = Geometry(step, window, buffers), Splitter(buffers)
    narrow_tiles = geometry.tiles(np.flatnonzero(narrow), buffers.tokens_per_tile(narrow_rows))
    sharers = share_prefixes(narrow_tiles, step.block_tables, buffers, captured_tokens)
    # Most steps are decode without shared prefixes, and for few sequences a GPU computes a step as fast as this plans
    # it: such steps skip what they do not need.
    shares = sharers is not NO_SHARERS
    parts_of_sharers = sharers.parts_of(narrow_tiles) if shares else None
    narrow_items, first_place, num_parts = splitter.split(narrow_tiles, parts_of_sharers)
    wide_items = NO_ITEMS
    if not narrow.all():
        wide_tiles = geometry.tiles(np.flatnonzero(~narrow), buffers.tokens_per_tile(wide_rows))
        wide_items, _, _ = splitter.split(wide_tiles)
    shared_items, gathered = NO_ITEMS, NOTHING_GATHERED
    if shares:
        shared_items, gathered = sharers.lay_out(narrow_tiles, first_place, num_parts, buffers.tile)
        if len(shared_items):
            shared_rows = sharers.num_rows
    return _Work(
        narrow_items, wide_items, shared_items, gathered, splitter.merges(), narrow_rows, wide_rows, shared_rows
    )


def _send(step: StepArrays, work: _Work, buffers: PlanBuffers, captured_tokens: int) -> None:
    """Write the plan into the buffers and copy it to the device."""
    host, sections = buffers.on_host, buffers.sections
    counts = host[sections["counts"]].reshape(4, COUNT_STRIDE)
    counts[:, 0] = len(work.narrow), len(work.wide), len(work.shared), len(work.merges)
    _put(host, sections["slots"], step.slots, fill_to=max(len(step.slots), captured_tokens))
    _put(host, sections["query_start_loc"], step.query_start_loc)
    _put(host, sections["seq_lens"], step.seq_lens)
    _put(host, sections["narrow"], work.narrow)
    _put(host, sections["wide"], work.wide)
    _put(host, sections["shared"], work.shared)
    _put(host, sections["gathered"], work.gathered)
    _put(host, sections["merges"], work.merges)
    _put(host, sections["block_tables"], step.block_tables)
    buffers.send(sections["block_tables"].start + step.block_tables.size)


def _view_plan(
    step: StepArrays, work: _Work, buffers: PlanBuffers, window: int, captured_tokens: int
) -> GpuAttentionPlan:
    """The plan as views of the buffers."""
    num_seqs, num_tokens = len(step.seq_lens), len(step.slots)
    counts = buffers.view("counts", 4, COUNT_STRIDE)

    def work_list(index: int, name: str, num_programs: int, num_rows: int) -> WorkList:
        return WorkList(buffers.view(name, num_programs, NUM_ITEM_COLUMNS), counts[index, :1], num_programs, num_rows)

    # At most one tile per token, and the parts that splitting adds.
    num_narrow_programs = captured_tokens + buffers.target_items if captured_tokens else len(work.narrow)
    num_merge_programs = min(buffers.max_places, captured_tokens) or len(work.merges)
    num_shared_programs = len(work.shared)
    if captured_tokens and work.shared_rows:
        num_shared_programs = buffers.captured_shared_items(work.shared_rows, captured_tokens)
    return GpuAttentionPlan(
        query_start_loc=buffers.view("query_start_loc", num_seqs + 1),
        seq_lens=buffers.view("seq_lens", num_seqs),
        # An empty tensor has no address, and a graph keeps the address that it was captured with.
        block_tables=buffers.view("block_tables", max(1, num_seqs), max(1, step.block_tables.shape[1])),
        slots=buffers.view("slots", max(num_tokens, captured_tokens)),
        window=window,
        narrow=work_list(0, "narrow", num_narrow_programs, work.narrow_rows),
        wide=work_list(1, "wide", len(work.wide), work.wide_rows),
        shared=work_list(2, "shared", num_shared_programs, work.shared_rows),
        gathered=buffers.view("gathered", buffers.max_places, len(GatheredColumn)),
        merges=buffers.view("merges", num_merge_programs, len(MergeColumn)),
        num_merges=counts[3, :1],
        num_merge_programs=num_merge_programs,
        partials=buffers.partials,
        partial_lse=buffers.partial_lse,
        tile=buffers.tile,
    )


def _put(host: Int32Array, section: slice, values: Int32Array | Sequence[int], fill_to: int = 0) -> None:
    flat = np.ravel(values)
    end = section.start + len(flat)
    assert end <= section.stop, "the plan outgrew its buffers"
    if len(flat):
        host[section.start : end] = flat
    if fill_to > len(flat):
        host[end : section.start + fill_to] = -1
