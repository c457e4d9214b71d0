"""Two ranks in earnest: an engine process and its child hold the bundled model. Tokens are those of one rank."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, AsyncLLM, ConfigError, EngineConfig, SamplingParams
from quire.outputs import RequestOutput
from tests.checkpoints import make_checkpoint
from tests.engine.serving import until

OPTIONS: dict[str, Any] = {"num_blocks": 60, "max_model_len": 256, "threads": 1, "dtype": "float32"}
PROMPTS = [list(range(5, 75)), [3, 4, 5]]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=3, n=2, max_tokens=24, ignore_eos=True, repetition_penalty=1.2),
]


def tokens(output: RequestOutput) -> list[list[int]]:
    return [sample.token_ids for sample in sorted(output.outputs, key=lambda sample: sample.index)]


def child_of(pid: int) -> int:
    return int(subprocess.check_output(["pgrep", "-P", str(pid), "-f", "rank_process"]).split()[0])


@pytest.mark.parametrize("option", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_tokens_equal_one_ranks_and_a_killed_rank_costs_no_request(option: str, tmp_path: Path) -> None:
    """Stages have a part of each KV group, so theirs is a model with windows."""
    options = OPTIONS
    if option == "pipeline_parallel_size":
        options = {"model": str(make_checkpoint(tmp_path, "gemma3")), **OPTIONS}
    with LLM(**options) as llm:
        expected = [tokens(output) for output in llm.generate(PROMPTS, PARAMS)]

    async def run() -> None:
        engine = AsyncLLM(EngineConfig(spare=False, **{option: 2}, **options))
        await engine.start()
        assert engine.memory_plan.num_ranks == 2
        assert "memory of each of 2 ranks" in " ".join(engine.memory_plan.describe())
        try:
            await engine.wait_ready()
            first, begun = engine.engine_pid, asyncio.Event()

            async def ask(prompt: list[int], params: SamplingParams) -> list[list[int]]:
                whole = None
                async for output in engine.generate(prompt, params):
                    if whole is None:
                        whole = output
                    else:
                        whole.extend(output)
                    if len(whole.outputs[0].token_ids) >= 5:
                        begun.set()
                assert whole is not None
                return tokens(whole)

            asked = [asyncio.create_task(ask(*each)) for each in zip(PROMPTS, PARAMS, strict=True)]
            await begun.wait()
            os.kill(child_of(first), signal.SIGKILL)
            assert await asyncio.gather(*asked) == expected
            await until(lambda: engine.engine_pid != first)  # the group is replaced, even if all was answered by then
            assert engine.stats.num_used_blocks == 0
        finally:
            await engine.shutdown()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"disk_cache": "/tmp/x"}, "disk_cache is '/tmp/x', which needs one rank"),
        ({"enable_lora": True}, "enable_lora is True, which needs one rank"),
        ({"speculative_config": {"method": "ngram"}}, "speculative_config is .*, which needs one rank"),
        ({"weights_cache": "w"}, "weights_cache is 'w', which needs one rank"),
        ({"async_scheduling": True}, "async_scheduling is True, which needs one rank"),
        ({"tensor_parallel_size": 0}, "it must be an integer from 1 to 64"),
    ],
)
def test_what_ranks_cannot_do_is_refused(option: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel_size is {option.get('tensor_parallel_size', 2)}.*{reason}"):
        EngineConfig(**{"tensor_parallel_size": 2, **option})
