"""Launch parameters of the kernels. They are tables, not autotuned, so that no request waits for tuning.
`tests/kernels/triton` compiles every row for every architecture and holds its registers and shared memory to a budget.
"""

import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter. It computes with bfloat16 and float8 as if their bits were integers, so
kernels widen what they load when this is set."""
CHUNK = 4096
"""Logits of a program that takes a part of a row."""
CHUNK_WARPS = 8
ROW_WARPS = 8
"""Warps of a program that takes a whole row of logits."""


class AttentionConfig(NamedTuple):
    tile: int
    """Keys that a program takes at a time."""
    num_warps: int
    num_stages: int
    programs_per_sm: int
    """Programs that run on a multiprocessor of a Hopper GPU at once, by their registers and shared memory."""


def attention_config(num_rows: int, head_dim: int, max_tile: int, architecture: int) -> AttentionConfig:
    """The configuration for a number of rows, a head size, the widest tile of keys that the plan allows, and an
    architecture (90: Hopper).

    Few rows are decode, where reading keys takes the time: three stages keep copies in flight. Many rows are prefill,
    where the tensor cores take the time and registers limit what a warp may hold: there an Ampere GPU takes narrower
    tiles or more warps, and a Blackwell GPU more warps.
    """
    tile = min(64, max_tile)
    if head_dim > 128:
        if num_rows <= 32:
            return AttentionConfig(min(32, tile), 4, 3, 2 if num_rows == 16 else 1)
        return AttentionConfig(min(32, tile), 8 if architecture < 90 else 4, 2, 1)
    if num_rows <= 32:
        return AttentionConfig(tile, 4, 3, 3 if num_rows == 16 else 2)
    if num_rows == 64:
        return AttentionConfig(tile, 8 if architecture >= 100 else 4, 3, 1)
    return AttentionConfig(min(32, tile) if architecture < 90 and head_dim > 64 else tile, 8, 3, 1)


@lru_cache
def architecture_of(device: torch.device) -> int:
    """The compute capability of a device times ten; in the interpreter that of Hopper."""
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def compute_dtype(activations: torch.dtype, cache: torch.dtype) -> Any:
    """The type of both matrix products. float8 becomes float16, which holds each of its values and takes a third of the
    instructions that bfloat16 takes."""
    if INTERPRETED:
        return tl.float32
    if cache.itemsize == 1:
        return tl.float16
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[activations]


def num_warps_for(row_size: int) -> int:
    """Warps of a program that takes a whole row: at most 16 elements per thread, up to 16 warps."""
    return min(16, max(1, row_size // 512))
