"""Models with recurrent layers: greedy tokens equal transformers' with any batch, chunks, forks, snapshots and
preemptions, and prompts are found in the cache as those of other models are."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.config import EngineConfig
from quire.engine.memory_plan import plan_memory
from quire.errors import MemoryPlanError
from quire.model_config import ModelConfig
from tests.checkpoints import make_checkpoint, reference_model
from tests.engine.test_parity import BLOCK_SIZE, assert_greedy, make_llm, make_prompts

NUM_STEPS = 32
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS, ignore_eos=True)
SHORT = replace(GREEDY, max_tokens=8)


@pytest.fixture(scope="module", params=["qwen3-next", "granite-hybrid"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param, dtype="float32")


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> torch.nn.Module:
    return reference_model(checkpoint)


@pytest.mark.parametrize("batched_tokens", [512, 20], ids=["unchunked", "chunked"])
def test_seventeen_requests(checkpoint: Path, oracle: torch.nn.Module, batched_tokens: int) -> None:
    llm = make_llm(checkpoint, max_num_batched_tokens=batched_tokens)
    assert_greedy(oracle, llm.generate(make_prompts(17, longest=100), GREEDY), NUM_STEPS)
    assert llm.stats().total_preemptions == 0


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_forced_preemptions(checkpoint: Path, oracle: torch.nn.Module, enable_prefix_caching: bool) -> None:
    llm = make_llm(
        checkpoint,
        num_blocks=50,
        max_num_batched_tokens=64,
        enable_prefix_caching=enable_prefix_caching,
        max_model_len=180,
    )
    assert_greedy(oracle, llm.generate(make_prompts(17, longest=80), GREEDY), NUM_STEPS)
    stats = llm.stats()
    assert stats.total_preemptions > 0
    assert stats.num_used_blocks == 0
    assert stats.states.num_running == 0
    assert (stats.states.total_hits > 0) == enable_prefix_caching


def test_the_same_prompt_again(checkpoint: Path, oracle: torch.nn.Module) -> None:
    llm = make_llm(checkpoint)
    prompt = make_prompts(4, longest=100)[3] + [5] * (2 * BLOCK_SIZE)
    first, again = (llm.generate([prompt], SHORT) for _ in range(2))
    assert_greedy(oracle, first, 8)
    assert first[0].num_cached_tokens == 0
    assert again[0].num_cached_tokens == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert again[0].outputs[0].token_ids == first[0].outputs[0].token_ids


def test_turns_of_a_conversation_compute_only_what_is_new(checkpoint: Path, oracle: torch.nn.Module) -> None:
    llm = make_llm(checkpoint)
    prompts = make_prompts(6, longest=60)[3:]
    for known in (0, 1, 1):
        outputs = llm.generate(prompts, SHORT)
        assert_greedy(oracle, outputs, 8)
        # The answer without its last token, which is never computed, and the next message.
        assert [output.num_cached_tokens for output in outputs] == [known * (len(p) - 3) for p in prompts]
        prompts = [[*output.prompt_token_ids, *output.outputs[0].token_ids, 7, 8] for output in outputs]


@pytest.mark.parametrize("together", [True, False])
def test_prompts_that_begin_alike(checkpoint: Path, oracle: torch.nn.Module, together: bool) -> None:
    llm = make_llm(checkpoint)
    shared = [random.Random(3).randrange(256) for _ in range(4 * BLOCK_SIZE + 3)]
    prompts = [[*shared, 200 + number, *range(20)] for number in range(5)]
    batches = [prompts] if together else [[prompt] for prompt in prompts]
    outputs = [output for batch in batches for output in llm.generate(batch, SHORT)]
    assert_greedy(oracle, outputs, 8)
    # One by one, the second request finds where prompts part, and leaves a snapshot there for those after it.
    known = [0, *([4] if together else [0]), 4, 4, 4]
    assert [output.num_cached_tokens for output in outputs] == [blocks * BLOCK_SIZE for blocks in known]
    assert llm.stats().prefix_misses.get("state", 0) == (0 if together else 1)


def test_samples_and_beams_fork_the_state(checkpoint: Path, oracle: torch.nn.Module) -> None:
    llm = make_llm(checkpoint)
    prompt = make_prompts(4, longest=30)[3]
    (sampled,) = llm.generate([prompt], replace(SHORT, n=3))
    assert len({tuple(sample.token_ids) for sample in sampled.outputs}) == 1
    assert_greedy(oracle, [sampled], 8)
    (found,) = llm.generate([prompt], replace(SHORT, beam_width=3))
    with torch.inference_mode():
        expected = oracle.generate(
            torch.tensor([prompt]), num_beams=3, max_new_tokens=8, do_sample=False, eos_token_id=None
        )[0]
    assert found.outputs[0].token_ids == expected[len(prompt) :].tolist()


def test_registered_prefixes_keep_their_state(checkpoint: Path, oracle: torch.nn.Module) -> None:
    llm = make_llm(checkpoint, max_num_seqs=2)
    prefix = [random.Random(5).randrange(256) for _ in range(5 * BLOCK_SIZE)]
    llm.register_prefix(prefix)
    for seed in range(6):  # many more snapshots than there are slots
        llm.generate(make_prompts(3, longest=40, seed=seed), replace(SHORT, max_tokens=2))
    (output,) = llm.generate([[*prefix, 9, 9]], SHORT)
    assert output.num_cached_tokens == len(prefix)
    assert_greedy(oracle, [output], 8)
    states = llm.stats().states
    assert states.num_pinned == 1
    assert states.total_evicted > 0


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_evicted_states_come_back_from_tiers(
    checkpoint: Path, oracle: torch.nn.Module, tier: str, tmp_path: Path
) -> None:
    options = {"swap_space": "8MiB"} if tier == "host" else {"disk_cache": str(tmp_path)}
    llm = make_llm(checkpoint, num_blocks=40, max_num_seqs=2, max_model_len=240, **options)
    prompts = [[*make_prompts(4, longest=90, seed=seed)[3], *range(30)] for seed in range(6)]
    first = [llm.generate([prompt], SHORT)[0] for prompt in prompts]
    if tier == "disk":
        llm.close()
        llm = make_llm(checkpoint, num_blocks=40, max_num_seqs=2, max_model_len=240, **options)
    again = llm.generate(prompts, SHORT)
    assert_greedy(oracle, first, 8)
    assert [output.outputs[0].token_ids for output in again] == [output.outputs[0].token_ids for output in first]
    known = [(len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt in prompts]
    found = [output.num_cached_tokens for output in again]
    assert found[:4] == known[:4]
    assert llm.stats().tiers[tier].total_hits >= sum(known[:4])


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "qwen3.5")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_layers_give_the_same_tokens_in_every_batch(qwen: Path, quantization: str) -> None:
    llm = LLM(str(qwen), quantization=quantization, max_num_seqs=20, num_blocks=300, threads=1)
    prompts = make_prompts(17, longest=60)
    together = llm.generate(prompts, SHORT)
    alone = [llm.generate([prompt], SHORT)[0] for prompt in prompts[:5]]
    assert [o.outputs[0].token_ids for o in together[:5]] == [o.outputs[0].token_ids for o in alone]


def test_drafts_change_no_token(checkpoint: Path) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    # Few tokens are likely, so they come again and lookups guess right now and then.
    params = [
        replace(SHORT, max_tokens=40, allowed_token_ids=[3, 4, 5]),
        SamplingParams(max_tokens=40, n=2, seed=5, allowed_token_ids=[3, 4], ignore_eos=True),
    ]
    prompts = [[3, 4, 5] * 5, [4, 3] * 9 + [3]]
    found = []
    for speculative_config in (None, drafts):
        llm = make_llm(checkpoint, speculative_config=speculative_config)
        outputs = llm.generate(prompts, params)
        found.append([[sample.token_ids for sample in output.outputs] for output in outputs])
        # What drafts left behind is a state like any other: the next turn goes on from it.
        turn = [*prompts[0], *outputs[0].outputs[0].token_ids, 9]
        (again,) = llm.generate([turn], SHORT)
        assert again.num_cached_tokens == len(turn) - 2
        found.append(again.outputs[0].token_ids)
    assert found[:2] == found[2:]
    stats = llm.stats()
    assert 0 < stats.total_accepted_tokens < stats.total_draft_tokens
    assert (stats.states.num_running, stats.num_used_blocks) == (0, 0)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_plan_counts_states(qwen: Path) -> None:
    model = ModelConfig.from_folder(qwen)
    slot = model.spec.state_bytes
    # Per layer 3 older inputs of 2 * 2 * 12 + 4 * 16 channels, and a matrix of 12 * 16 for each of 4 heads.
    assert slot == 3 * 4 * (3 * (2 * 2 * 12 + 4 * 16) + 4 * 12 * 16)
    plan = plan_memory(EngineConfig(max_num_seqs=8), model, 2**30)
    assert (plan.num_state_slots, plan.state_bytes, plan.max_num_seqs) == (16, slot, 8)
    assert plan.total == plan.weights + plan.activations + plan.logprobs + plan.kv_cache + 16 * slot
    assert "16 slots of" in "\n".join(plan.describe())
    small = plan_memory(EngineConfig(max_num_seqs=8, state_memory=5 * slot), model, 2**30)
    assert (small.num_state_slots, small.max_num_seqs) == (5, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"state_memory": 1000},
            MemoryPlanError,
            "state of one sequence takes 12.94 KiB.*state_memory is 1000 B; raise",
        ),
        ({"state_memory": "2GiB"}, MemoryPlanError, "state_memory is 2 GiB, but beside weights and activations"),
    ],
)
def test_options_that_do_not_fit(qwen: Path, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_memory(EngineConfig.from_options(options), ModelConfig.from_folder(qwen), 2**30)
