"""Cost of scheduling: operations of the block pool and whole steps of the scheduler, without a model.

`python -m benchmarks.scheduler` prints JSON: processor time, the median of several repeats. For steps of which only
some ask the forecast, it is the mean.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable

from quire.kv_cache.block_hash import root_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.block_table import BlockTable
from quire.request import Request
from quire.sampling_params import SamplingParams
from quire.scheduler.length_curve import MIN_ANSWERS
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.policies import ADMISSIONS
from quire.scheduler.scheduler import Scheduler
from quire.step import StepPlan, StepResult

BLOCK_SIZE = 16
PROMPT_TOKENS = 64
MAX_TOKENS = 190
APPENDS = 100_000
REPEATS = 7


def main() -> None:
    figures = {
        "pool_of_1m_blocks_s": round(median_seconds(lambda: BlockPool(1_000_000, BLOCK_SIZE)), 3),
        "append_and_free_us": round(median_seconds(append_and_free) / APPENDS * 1e6, 2),
        "step_of_256_ms": round(statistics.median(step_seconds(256)) * 1e3, 3),
        "step_of_1024_ms": round(statistics.median(step_seconds(1024)) * 1e3, 3),
        "step_of_256_predicted_ms": round(statistics.fmean(step_seconds(256, "predicted")) * 1e3, 3),
        "step_of_1024_predicted_ms": round(statistics.fmean(step_seconds(1024, "predicted")) * 1e3, 3),
    }
    print(json.dumps(figures, indent=2))


def median_seconds(run: Callable[[], object]) -> float:
    """Median processor time of a call."""
    seconds: list[float] = []
    for _ in range(REPEATS):
        gc.collect()
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def append_and_free() -> None:
    """Allocate a block for one token and free it."""
    pool = BlockPool(1024, BLOCK_SIZE)
    table = BlockTable(pool, root_hash("", BLOCK_SIZE))
    for _ in range(APPENDS):
        table.append(1, [])
        table.free()


def step_seconds(num_seqs: int, admission: str = "current") -> list[float]:
    """Processor times of schedule() and update(), step by step, while `num_seqs` sequences decode.

    With predicted admission, requests wait that fit now but not at the peak, so every step asks the forecast.
    """
    num_waiting = 64 if admission == "predicted" else 0
    scheduler = Scheduler(
        BlockPool(num_seqs * 16, BLOCK_SIZE),
        SchedulerLimits(max_num_seqs=num_seqs + num_waiting, max_num_batched_tokens=2 * num_seqs, max_model_len=1024),
        make_rule=ADMISSIONS[admission],
    )
    if num_waiting:
        add(scheduler, range(-MIN_ANSWERS, 0))
        while scheduler.has_work:
            plan = scheduler.schedule()
            scheduler.update(plan, sampled(plan))
    add(scheduler, range(num_seqs))
    num_decoding = 0
    while num_decoding < num_seqs:
        plan = scheduler.schedule()
        scheduler.update(plan, sampled(plan))
        num_decoding = len(plan.sample_rows)
    add(scheduler, range(num_seqs, num_seqs + num_waiting), num_tokens=800)
    seconds: list[float] = []
    for _ in range(100):
        start = time.process_time()
        plan = scheduler.schedule()
        planned = time.process_time()
        result = sampled(plan)
        update = time.process_time()
        scheduler.update(plan, result)
        seconds.append(time.process_time() - update + planned - start)
    assert (scheduler.stats().num_waiting > 0) == (num_waiting > 0)
    return seconds


def add(scheduler: Scheduler, numbers: range, num_tokens: int = PROMPT_TOKENS) -> None:
    """Requests whose prompts share no prefix."""
    for number in numbers:
        prompt = [(number + MIN_ANSWERS) * PROMPT_TOKENS + position for position in range(num_tokens)]
        request = Request(
            request_id=f"{number}",
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=MAX_TOKENS),
            eos_token_ids=(0,),
            max_tokens=MAX_TOKENS,
        )
        scheduler.add(request)


def sampled(plan: StepPlan) -> StepResult:
    """A result in which every sample is token 1."""
    num_samples = len(plan.sample_rows)
    return StepResult([1] * num_samples, [None] * num_samples, [None] * num_samples)


if __name__ == "__main__":
    main()
