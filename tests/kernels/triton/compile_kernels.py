"""Compiles every kernel in every listed configuration for GPUs that are not here, and prints what each needs.

    python -m tests.kernels.triton.compile_kernels

One JSON object per line, for `test_configs.py`, which runs this in a process of its own: Triton's interpreter rewrites
kernels when they are imported. Needs no driver; the disassembler comes with Triton.
"""

import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

BLOCK_SIZE = 64
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
ARCHITECTURES = (80, 90, 100)


class Build(NamedTuple):
    """One kernel to compile: its name, the types of its pointers and numbers, its constants, and how it is launched."""

    architecture: int
    kernel: str
    label: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    facts: dict[str, Any]
    """Handed on to the tests."""


def attention_builds(architecture: int) -> Iterator[Build]:
    from quire.attention.plan_buffers import tile_of
    from quire.kernels.triton.configs import attention_config, compute_dtype

    variants: list[tuple[int, int, str, dict[str, Any]]]
    variants = [(rows, head_dim, "bf16", {}) for rows in (16, 32, 64, 128) for head_dim in (64, 128)]
    variants += [(rows, 256, "bf16", {}) for rows in (16, 32, 64)]
    variants += [(16, 128, "bf16", {"HAS_WINDOW": True}), (128, 128, "bf16", {"HAS_WINDOW": True, "SOFTCAP": 50.0})]
    variants += [(16, 80, "fp16", {}), (16, 128, "bf16", {"GATHERED": True}), (64, 128, "bf16", {"GATHERED": True})]
    variants += [(128, 128, "bf16", {"HAS_SLOPES": True})]
    variants += [(rows, 128, "bf16", {"BLOCK_SIZE": size}) for rows, size in ((16, 16), (16, 32), (128, 16))]
    variants += [(16, 128, "bf16", {"GROUP": 7, "BLOCK_SIZE": 256})]
    if architecture >= 89:  # older ones have no instructions for this float8
        variants += [(rows, head_dim, "fp8e4nv", {}) for rows in (16, 128) for head_dim in (64, 128)]
    for rows, head_dim, kv, options in variants:
        activations = "bf16" if kv == "fp8e4nv" else kv
        config = attention_config(rows, head_dim, tile_of(options.get("BLOCK_SIZE", BLOCK_SIZE)), architecture)
        types = {
            **dict.fromkeys(("q", "out"), f"*{activations}"),
            **dict.fromkeys(("k_cache", "v_cache"), f"*{kv}"),
            **dict.fromkeys(("partials", "partial_lse", "slopes", "k_scale", "v_scale"), "*fp32"),
            **dict.fromkeys(("items", "count", "gathered", "block_tables"), "*i32"),
            "scale": "fp32",
            **dict.fromkeys(("q_stride", "window"), "i32"),
        }
        constants = {
            "NUM_KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": head_dim, "BLOCK_D": 1 << (head_dim - 1).bit_length(),
            "BLOCK_SIZE": BLOCK_SIZE, "ROWS": rows, "TILE": config.tile, "STAGES": config.num_stages,
            "COMPUTE": compute_dtype(TYPES[activations], TYPES[kv]), "HAS_WINDOW": False, "SOFTCAP": 0.0,
            "HAS_SLOPES": False, "SCALED": kv == "fp8e4nv", "GATHERED": False, "UPCAST": False, **options,
        }  # fmt: skip
        if not constants["HAS_SLOPES"]:
            constants["slopes"] = None
        if not constants["SCALED"]:
            constants["k_scale"] = constants["v_scale"] = None
        facts = {"rows": rows, "programs_per_sm": config.programs_per_sm}
        label = f"attention rows {rows} head {head_dim} {kv} {options or ''}".strip()
        yield Build(architecture, "attention:attention_kernel", label, types, constants, config.num_warps, facts)


def small_builds(architecture: int) -> Iterator[Build]:
    from quire.kernels.triton import activation, attention, blocks, rotary_kv, sampling
    from quire.kernels.triton.configs import num_warps_for

    def build(kernel: str, types: dict[str, str], constants: dict[str, Any], num_warps: int) -> Build:
        return Build(architecture, kernel, kernel.partition(":")[2], types, constants, num_warps, {})

    yield build(
        "attention:merge_kernel",
        {"out": "*bf16", "partials": "*fp32", "partial_lse": "*fp32", "merges": "*i32", "count": "*i32"},
        {"NUM_HEADS": 32, "HEAD_DIM": 128, "BLOCK_D": 128, "PARTS": attention.MERGE_PARTS},
        attention.MERGE_WARPS,
    )
    yield build(
        "norm:rms_norm_kernel",
        {"x": "*bf16", "residual": "*bf16", "weight": "*fp32", "out": "*bf16", "x_stride": "i32",
         "residual_stride": "i32", "eps": "fp32"},
        {"SIZE": 8192, "BLOCK": 8192, "HAS_RESIDUAL": True},
        num_warps_for(8192),
    )  # fmt: skip
    yield build(
        "norm:rms_norm_heads_kernel",
        {"x": "*bf16", "weight": "*fp32", "x_stride": "i32", "eps": "fp32"},
        {"NUM_HEADS": 32, "HEAD_DIM": 128, "HEADS": 8, "BLOCK": 128},
        4,
    )
    yield build(
        "activation:gated_kernel",
        {"x": "*bf16", "out": "*bf16", "x_stride": "i32", "size": "i32"},
        {"BLOCK": activation.BLOCK, "FUNCTION": "silu"},
        activation.NUM_WARPS,
    )
    kv = "fp8e4nv" if architecture >= 89 else "bf16"
    yield build(
        "rotary_kv:rotary_kv_kernel",
        {"q": "*bf16", "k": "*bf16", "v": "*bf16", "positions": "*i32", "cos_sin": "*fp32", "k_cache": f"*{kv}",
         "v_cache": f"*{kv}", "slots": "*i32", "q_stride": "i32", "k_stride": "i32", "v_stride": "i32",
         "k_scale": "*fp32", "v_scale": "*fp32"},
        {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK_D": 128, "HALF": 64, "BLOCK_HALF": 64,
         "BLOCK_SIZE": BLOCK_SIZE, "HEADS": rotary_kv.HEADS, "ROTATES": True, "WRITES": True, "SCALED": True},
        rotary_kv.NUM_WARPS,
    )  # fmt: skip
    yield build(
        "blocks:copy_blocks_kernel",
        {"addresses": "*i64", "pairs": "*i32", "block_words": "i32"},
        {"CHUNK": blocks.CHUNK},
        blocks.NUM_WARPS,
    )
    rows = {"logits": "*bf16", "chunk_peaks": "*fp32", "stride": "i32", "size": "i32", "num_chunks": "i32"}
    yield build("sampling:peaks_kernel", {**rows, "chunk_ids": "*i32"}, {"CHUNK": sampling.CHUNK}, sampling.CHUNK_WARPS)
    chunks = {"CHUNK": sampling.CHUNK, "CHUNKS": 64}
    asked = {"temperatures": "*fp32", "top_ks": "*i32", "top_ps": "*fp64", "min_ps": "*fp32"}
    draws = {**rows, **asked, "chunk_weights": "*fp64", "ids": "*i32", "num_ids": "*i32"}
    ranges = {**draws, "range_weights": "*fp64", "range_counts": "*i32"}
    yield build("sampling:weights_kernel", ranges, {**chunks, "PART": sampling.PART}, sampling.CHUNK_WARPS)
    yield build("sampling:list_kernel", ranges, chunks, sampling.CHUNK_WARPS)
    yield build(
        "sampling:sample_kernel",
        {**draws, "chunk_ids": "*i32", "keys": "*i64", "positions": "*i64", "tokens": "*i32", "peaks": "*fp32"},
        {**chunks, "BLOCK": sampling.BLOCK},
        sampling.ROW_WARPS,
    )
    reports = {**rows, "tokens": "*i32", "nums_reported": "*i32", "chunk_sums": "*fp64", "chunk_ahead": "*i32",
               "chunk_leaders": "*i64", "reports": "*i32", "num_rows": "i32"}  # fmt: skip
    yield build(
        "logprobs:chunk_reports_kernel",
        reports,
        {"CHUNK": sampling.CHUNK, "LEADERS": 32},
        sampling.CHUNK_WARPS,
    )
    yield build(
        "logprobs:reports_kernel",
        reports,
        {"CHUNKS": 64, "LEADERS": 32, "MAX_REPORTED": 20},
        sampling.ROW_WARPS,
    )


def compile_one(build: Build) -> dict[str, Any]:
    """Registers, stack and shared memory, and how often some instructions occur."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = build.kernel.partition(":")
    kernel = getattr(importlib.import_module(f"quire.kernels.triton.{module}"), name)
    names = list(kernel.arg_names)
    types = {each: type_ for each, type_ in build.types.items() if each in names and each not in build.constants}
    signature = {each: types.get(each, "constexpr") for each in names}
    # What a launch finds out by itself: addresses and strides are multiples of 16.
    aligned = [each for each, type_ in types.items() if type_ != "fp32" and each not in ("window", "num_rows")]
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            constexprs=build.constants,
            attrs={(names.index(each),): [["tt.divisibility", 16]] for each in aligned},
        ),
        target=GPUTarget("cuda", build.architecture, 32),
        options={"num_warps": build.num_warps},
    )
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()

        def read(option: str) -> str:
            run = subprocess.run([disassembler, option, cubin.name], capture_output=True, text=True, check=True)
            return run.stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", read("-res-usage"))
        code = read("-sass")
    assert usage is not None
    return {
        "architecture": build.architecture,
        "label": build.label,
        "num_warps": build.num_warps,
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "shared": compiled.metadata.shared,
        "async_copies_16": len(re.findall(r"\bLDGSTS\S*\.128|\bUTMALDG", code)),
        "wgmma": len(re.findall(r"\bHGMMA", code)),
        **build.facts,
    }


def main() -> None:
    builds = [
        build
        for architecture in ARCHITECTURES
        for builds_of in (attention_builds, small_builds)
        for build in builds_of(architecture)
    ]
    with multiprocessing.get_context("spawn").Pool(min(4, os.cpu_count() or 1)) as pool:
        for report in pool.imap(compile_one, builds):
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
