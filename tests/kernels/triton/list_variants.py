"""Runs steps of a small model whose kernels are not launched, and prints each variant that Triton would compile.

    python -m tests.kernels.triton.list_variants

One JSON list per line, a kernel's name and what it is specialised on, for `test_variants.py`, which runs this in a
process of its own: Triton's interpreter rewrites kernels when they are imported. Needs no driver.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from quire.attention import AttentionShape, StepArrays, make_planner
from quire.kernels import kernels_for, transfer
from quire.kernels.triton import sampling
from quire.kv_cache.storage import KVCache
from quire.kv_groups import KVGroup
from quire.layers.step_context import StepContext
from quire.models.device_weights import DeviceWeights
from quire.models.random_weights import RandomWeights
from quire.models.registry import load_model
from quire.sampling.device_sampler import KERNEL_COLUMNS, DeviceSampler
from tests.kernels.triton import test_steps

# Eight tokens that are checked together then fill as many rows as nine of a prompt.
CONFIG = replace(test_steps.CONFIG, num_heads=7, num_kv_heads=1)
CPU = torch.device("cpu")
BLOCK_SIZE, MAX_SEQS, MAX_TOKENS = 64, 40, 512
DECODE = range(1, MAX_SEQS + 1)
PROMPTS = [1, 2, 9, 16, 17, 40, 128, 200, 333]


def note(self: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
    """In the place of a launch: what decides whether Triton compiles the kernel anew."""
    binder = create_function_from_signature(self.signature, self.params, make_backend(GPUTarget("cuda", 90, 32)))
    _, specialisation, options = binder(*args, **kwargs)
    names = [param.name for param in self.params]
    print(json.dumps([self.fn.__name__, str(list(zip(names, specialisation, strict=True))), str(options)]))


def main() -> None:
    JITFunction.run = note
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    kernels = kernels_for("triton")
    weights = DeviceWeights(RandomWeights(0), CPU, torch.bfloat16)
    model = load_model(CONFIG, weights, kernels, "bfloat16")
    cache = KVCache(
        groups=[KVGroup("full", 0, (0,))],
        shapes=kernels.kv_cache_shapes(64, CONFIG.num_kv_heads, BLOCK_SIZE, CONFIG.head_dim),
        block_size=BLOCK_SIZE,
        dtype=torch.bfloat16,
    )
    torch.cuda.get_device_properties = lambda device: type("Card", (), {"multi_processor_count": 4})
    plan = make_planner(
        "triton",
        AttentionShape(
            num_heads=CONFIG.num_heads, num_kv_heads=CONFIG.num_kv_heads, head_dim=CONFIG.head_dim,
            block_size=BLOCK_SIZE, window=0, max_num_seqs=MAX_SEQS, max_num_tokens=MAX_TOKENS, max_blocks=16,
            num_threads=1, kv_element_size=2, batch_invariant=False, device=CPU,
        ),
    )  # fmt: skip
    sampler = DeviceSampler(CONFIG.vocab_size, sampling)
    fixed = transfer.FixedArrays({**KERNEL_COLUMNS, "ids": np.int32(0), "places": np.int32(0)}, MAX_SEQS, CPU)

    def step(query_lens: Sequence[int], captured: int = 0) -> None:
        count, tokens = len(query_lens), sum(query_lens)
        starts = np.cumsum([0, *query_lens]).astype(np.int32)
        lengths = np.array([each + 30 for each in query_lens], dtype=np.int32)
        tables = np.zeros((count, 16), dtype=np.int32)
        arrays = StepArrays(starts, lengths, tables, np.full(tokens, -1, dtype=np.int32))
        attention = plan(arrays, captured_tokens=captured)
        if captured:
            sent = fixed.first(captured)
        else:
            ids, columns = np.zeros(tokens, dtype=np.int32), {x: np.full(count, y) for x, y in KERNEL_COLUMNS.items()}
            # As `transfer.send` lays them out on a device.
            sent = transfer.FixedArrays(KERNEL_COLUMNS, count, CPU).first(len(columns["keys"]))
            sent |= transfer.FixedArrays({"ids": ids[0], "places": ids[0]}, tokens, CPU).first(tokens)
        hidden = model(sent["ids"], StepContext(sent["places"], cache.layers, [attention]))
        read = hidden if captured or tokens == count else hidden[torch.zeros(count, dtype=torch.int32)]
        sampler.sample(model.logits(read), sent, with_logprobs=True)

    with torch.inference_mode():
        for size in DECODE:
            step([1] * size)
            step([1] * (size // 2), captured=size)
        for length in PROMPTS:
            step([length])
            step([1, 1, length])
        step([8] * 6)


if __name__ == "__main__":
    main()
