"""KV memory of a long sequence with one block table per KV group, and with one for all layers:
`python -m benchmarks.kv_groups [--context 32768]`.

The engine's own scheduler computes a prompt and decodes 512 tokens, without a model; its blocks are counted.
"""

import argparse
import json
from typing import Any

from quire.kv_cache.block_pool import BlockPool
from quire.kv_groups import KVLayout, describe_groups
from quire.layer_spec import KVSpec
from quire.request import Request
from quire.sampling_params import SamplingParams
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.step import StepResult

BLOCK_SIZE = 16
STEP_TOKENS = 512
OUTPUT = 512
SHAPES = {
    "Gemma-3-1B-shaped": (([512] * 5 + [0]) * 4 + [512] * 2, 1, 256),
    "gpt-oss-20B-shaped": ([128, 0] * 12, 8, 64),
    "Mistral-7B-v0.1-shaped": ([4096] * 32, 8, 128),
}
"""The window of each layer, KV heads, and elements of a head."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_groups", description=__doc__)
    parser.add_argument("--context", type=int, default=32768)
    context = parser.parse_args().context
    print(json.dumps([measure(name, context) for name in SHAPES], indent=2))


def measure(name: str, context: int) -> dict[str, Any]:
    """MiB of bfloat16 keys and values at the peak, and while the last tokens are decoded."""
    windows, num_heads, head_dim = SHAPES[name]
    rows = [
        KVSpec(
            kind="window" if window else "full",
            num_heads=num_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            window=window,
        )
        for window in windows
    ]
    layout = KVLayout.of_layers(rows)
    peak, last = blocks_used(layout, context)
    mib = layout.block_bytes(BLOCK_SIZE, "bfloat16") / 2**20
    one_group = sum(row.bytes_per_token("bfloat16") for row in rows) * context / 2**20
    return {
        "model": name,
        "groups": describe_groups(layout.groups),
        "one_group_mib": round(one_group, 1),
        "peak_mib": round(peak * mib, 1),
        "decoding_mib": round(last * mib, 1),
        "times_smaller": round(one_group / (last * mib), 2),
    }


def blocks_used(layout: KVLayout, context: int) -> tuple[int, int]:
    """Blocks in use at the peak, and in the last step."""
    pool = BlockPool(len(layout.groups) * context // BLOCK_SIZE, BLOCK_SIZE, windows=layout.windows)
    limits = SchedulerLimits(max_num_seqs=1, max_num_batched_tokens=STEP_TOKENS, max_model_len=context)
    scheduler = Scheduler(pool, limits)
    params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    prompt = list(range(context - OUTPUT))
    scheduler.add(Request(request_id="long", prompt_token_ids=prompt, params=params, max_tokens=OUTPUT))
    used = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        used.append(pool.num_used)
        count = len(plan.sample_rows)
        scheduler.update(plan, StepResult(token_ids=[1] * count, logprobs=[None] * count, errors=[None] * count))
    return max(used), used[-1]


if __name__ == "__main__":
    main()
