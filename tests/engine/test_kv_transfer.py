"""Prefill and decode apart: one engine computes a prompt, another fetches its blocks and goes on with the same tokens.
Whatever happens to the first, the second answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, ConfigError, EngineConfig, SamplingParams
from quire.kv_cache.block_hash import hash_block, root_hash
from quire.request import PrefilledPrompt
from tests.checkpoints import make_checkpoint

PROMPT = [(7 * place) % 250 for place in range(100)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
OPTIONS: dict[str, Any] = {"num_blocks": 60, "max_model_len": 256, "threads": 1, "max_num_batched_tokens": 256}
PORT = 24680


@pytest.fixture(scope="module", params=["gemma3", "qwen3-next"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture
def key(tmp_path: Path) -> str:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef0123456789abcdef")
    return str(path)


@pytest.fixture
def producer(folder: Path, tmp_path: Path, key: str) -> Iterator[LLM]:
    """An engine that has computed the prompt."""
    transfer = {"kv_role": "kv_producer", "kv_port": PORT, "kv_key_file": key}
    with LLM(str(folder), disk_cache=str(tmp_path / "first"), kv_transfer_config=transfer, **OPTIONS) as llm:
        llm.generate([PROMPT], [GREEDY])
        yield llm


def consumer(folder: Path, disk: Path, key: str, peer: str = f"127.0.0.1:{PORT}") -> LLM:
    transfer = {"kv_role": "kv_consumer", "kv_peers": [peer], "kv_key_file": key}
    return LLM(str(folder), disk_cache=str(disk), kv_transfer_config=transfer, **OPTIONS)


def tokens(llm: LLM, prompt: list[int]) -> list[int]:
    return llm.generate([prompt], [GREEDY])[0].outputs[0].token_ids


@pytest.mark.usefixtures("producer")
def test_blocks_of_a_prompt_come_from_the_engine_that_computed_it(folder: Path, tmp_path: Path, key: str) -> None:
    with LLM(str(folder), **OPTIONS) as alone:
        expected = tokens(alone, PROMPT)
    with consumer(folder, tmp_path / "second", key) as llm:
        other = tokens(llm, [*PROMPT[1:], 3])
        assert llm.stats().tiers["disk"].total_hits == 0, "only where a prompt was computed elsewhere"
        assert tokens(llm, PrefilledPrompt(PROMPT)) == expected
        hits = llm.stats().tiers["disk"].total_hits
        assert hits == 96, "all full blocks"
        assert tokens(llm, PrefilledPrompt([*PROMPT[1:], 3])) == other, "what is in the pool is not asked for"
        assert tokens(llm, PrefilledPrompt([5, *PROMPT])) == tokens(llm, [5, *PROMPT]), "what nobody has is computed"
        assert llm.stats().tiers["disk"].total_hits == hits
        assert llm.stats().num_used_blocks == 0


def test_a_damaged_block_and_a_dead_engine_cost_time_alone(tmp_path: Path, key: str) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    transfer = {"kv_role": "kv_producer", "kv_port": PORT + 1, "kv_key_file": key}
    prompts = [PROMPT, PROMPT[::-1]]
    with LLM(str(folder), disk_cache=str(tmp_path / "first"), kv_transfer_config=transfer, **OPTIONS) as first:
        expected = [tokens(first, prompt) for prompt in prompts]
        hashes = first_hashes(PROMPT)
        with consumer(folder, tmp_path / "second", key, f"127.0.0.1:{PORT + 1}") as llm:
            (path,) = (tmp_path / "first").rglob(hashes[3].hex())
            content = bytearray(path.read_bytes())
            content[-5] ^= 4
            path.write_bytes(content)
            assert tokens(llm, PrefilledPrompt(prompts[0])) == expected[0]
            assert llm.stats().tiers["disk"].total_hits == 3 * 16, "the blocks before it"
            first.close()
            assert tokens(llm, PrefilledPrompt(prompts[1])) == expected[1]
            assert llm.stats().num_used_blocks == 0


def first_hashes(prompt: list[int]) -> list[bytes]:
    parent, hashes = root_hash("", 16), []
    for begin in range(0, len(prompt) - 15, 16):
        parent = hash_block(parent, prompt[begin : begin + 16])
        hashes.append(parent)
    return hashes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "kv_transfer_config is given, but blocks are given from the disk tier"),
        ({"disk_cache": "d", "data_parallel_size": 2}, "data_parallel_size is 2: all engines would listen at one port"),
        ({"disk_cache": "d", "pipeline_parallel_size": 2}, "disk_cache is 'd', which needs one rank"),
    ],
)
def test_what_a_transfer_needs(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(kv_transfer_config='{"kv_role": "kv_producer", "kv_key_file": "k"}', **options)
    assert said in str(caught.value)
