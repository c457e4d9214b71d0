"""The engine on a real card: the tokens of transformers, whatever the backend, graphs, overlap and memory.

Off a card the same tests run small over what stands for one (rehearsal.py), so that no first minute of a card is spent
on a wrong name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from tests.checkpoints import make_checkpoint, reference_model
from tests.engine.test_overlap import PARAMS, requests, seen
from tests.engine.test_parity import assert_greedy, make_prompts

ON_CARD = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("card"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.filterwarnings(
        "ignore:(overflow|invalid value|divide by zero|All-NaN slice) encountered:RuntimeWarning"
    ),
]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "llama-rope-llama3"] if ON_CARD else ["qwen3"]
BACKENDS = ["triton", "sdpa"]
NUM_STEPS, NUM_PROMPTS, LONGEST = (128, 17, 100) if ON_CARD else (3, 3, 20)
FEW_BLOCKS: dict[str, Any] = (
    {"num_blocks": 40, "max_model_len": 240} if ON_CARD else {"num_blocks": 3, "max_model_len": 48}
)
"""Of 16 tokens: too few for all prompts at once."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS, ignore_eos=True)


def make_llm(checkpoint: Path, **options: Any) -> LLM:
    return LLM(str(checkpoint), **{"device": "cuda", "num_blocks": 200, "max_num_seqs": 20, **options})


def capture_graphs(llm: LLM) -> None:
    """What serving does when it has nothing else to do."""
    core: Any = llm._engine._core  # what serves no request has no interface
    while core.has_idle_work:
        core.step()


def some_requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Every kind of sampling; in a rehearsal two of them, and few tokens."""
    if ON_CARD:
        return requests()
    kinds = [SamplingParams(**PARAMS[kind], max_tokens=5) for kind in ("greedy", "top_p")]
    return make_prompts(2, longest=20), kinds


@pytest.fixture(autouse=True)
def exact_products() -> None:
    """float32 products without TF32, as the oracle on the CPU computes them."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_equal_transformers(family: str, backend: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, family)
    oracle, prompts = reference_model(checkpoint), make_prompts(NUM_PROMPTS, longest=LONGEST)
    llm = make_llm(checkpoint, attention_backend=backend, max_num_batched_tokens=64)
    assert_greedy(oracle, llm.generate(prompts, GREEDY), NUM_STEPS)
    capture_graphs(llm)
    assert_greedy(oracle, llm.generate(prompts, GREEDY), NUM_STEPS)  # from the prefix cache, and from graphs
    small = make_llm(checkpoint, attention_backend=backend, block_size=16, **FEW_BLOCKS)
    assert_greedy(oracle, small.generate(prompts, GREEDY), NUM_STEPS)
    assert small.stats().total_preemptions > 0


@pytest.mark.parametrize("enforce_eager", [False, True] if ON_CARD else [False])
@pytest.mark.parametrize("async_scheduling", [False, True] if ON_CARD else [True])
def test_no_token_depends_on_how_steps_are_run(enforce_eager: bool, async_scheduling: bool, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "qwen3")
    on_cpu = LLM(str(checkpoint), device="cpu", num_blocks=400, max_num_seqs=16)
    llm = make_llm(checkpoint, enforce_eager=enforce_eager, async_scheduling=async_scheduling)
    expected = seen(on_cpu.generate(*some_requests()))
    assert seen(llm.generate(*some_requests())) == expected
    capture_graphs(llm)
    assert seen(llm.generate(*some_requests())) == expected


def test_drafts_and_log_probabilities_from_graphs(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "qwen3")
    prompts = [[9, 4, 7, 200] * 4, list(range(100)), [5] * 6]
    params = SamplingParams(temperature=0.0, max_tokens=40, logprobs=5, prompt_logprobs=2, ignore_eos=True)
    on_cpu = LLM(str(checkpoint), device="cpu", num_blocks=400, max_num_seqs=16)
    backend = "triton" if ON_CARD else "sdpa"  # forty tokens take the interpreter minutes
    llm = make_llm(
        checkpoint, attention_backend=backend, speculative_config={"method": "ngram", "prompt_lookup_min": 1}
    )
    expected = on_cpu.generate(prompts, params)
    for _ in range(2):
        for one, other in zip(llm.generate(prompts, params), expected, strict=True):
            assert one.outputs[0].token_ids == other.outputs[0].token_ids
            for told, wanted in (
                (one.prompt_logprobs[1:], other.prompt_logprobs[1:]),
                (one.outputs[0].logprobs, other.outputs[0].logprobs),
            ):
                for found, position in zip(told, wanted, strict=True):
                    assert list(found) == list(position)
                    assert all(abs(found[id].logprob - position[id].logprob) < 1e-3 for id in found)
        capture_graphs(llm)
    assert llm.stats().total_draft_tokens > 0


@pytest.mark.skipif(not ON_CARD, reason="a hundred steps take Triton's interpreter minutes")
def test_graphs_are_captured_anew_after_their_memory_was_given_back(tmp_path: Path) -> None:
    llm = make_llm(make_checkpoint(tmp_path, "llama"))
    prompts = make_prompts(5, longest=40)
    runner: Any = llm._engine._core._executor
    expected = seen(llm.generate(prompts, GREEDY))
    for _ in range(3):
        capture_graphs(llm)
        assert runner._graphs._graphs
        assert seen(llm.generate(prompts, GREEDY)) == expected
        runner._graphs.forget()
        torch.cuda.empty_cache()
        for _ in range(2):
            assert seen(llm.generate(prompts, GREEDY)) == expected


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "fp8"])
def test_sixteen_bits_and_eight_of_kv(kv_cache_dtype: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "qwen3", dtype="bfloat16")
    prompt = make_prompts(4, longest=LONGEST)[3]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (output,) = make_llm(checkpoint, kv_cache_dtype=kv_cache_dtype).generate([prompt], params)
    with torch.inference_mode():
        expected = reference_model(checkpoint)(torch.tensor([prompt])).logits[0].log_softmax(-1)
    found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    wanted = expected[range(len(prompt) - 1), prompt[1:]]
    assert (torch.tensor(found) - wanted).abs().mean() < (0.3 if kv_cache_dtype == "fp8" else 0.1)


def test_swapped_blocks_come_back(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama")
    oracle, prompts = reference_model(checkpoint), make_prompts(NUM_PROMPTS, longest=LONGEST)
    backend = "triton" if ON_CARD else "sdpa"
    llm = make_llm(checkpoint, attention_backend=backend, block_size=16, swap_space="64MiB", **FEW_BLOCKS)
    assert_greedy(oracle, llm.generate(prompts, GREEDY), NUM_STEPS)
    assert_greedy(oracle, llm.generate(prompts, GREEDY), NUM_STEPS)


def test_a_plan_holds_what_is_allocated(tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    llm = make_llm(make_checkpoint(tmp_path, "llama"), num_blocks=2000)
    plan = llm._engine.memory_plan
    allocated = torch.cuda.memory_allocated() - before
    assert allocated <= 1.05 * (plan.weights + plan.kv_cache) + 2**24
