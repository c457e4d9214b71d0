"""Whole steps of the engine over the Triton kernels: captured, with prefixes shared or not, they give the tokens of a
CPU. Off a card a graph is a fake that launches again what was recorded, over the same memory."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.attention.triton import PlanBuffers
from quire.engine.core import EngineCore
from quire.grammar.cache import GrammarCache
from quire.kernels import kernels_for
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.storage import KVCache
from quire.kv_groups import KVGroup
from quire.model_config import ModelConfig, RopeConfig
from quire.models.device_weights import DeviceWeights
from quire.models.random_weights import RandomWeights
from quire.models.registry import load_model
from quire.request import Request
from quire.runner import cuda_graphs
from quire.runner.cuda_graphs import CudaCapture, DecodeGraphs, GraphKey, Outcome
from quire.runner.model_runner import ModelRunner, PendingStep, RunnerSettings
from quire.sampling_params import SamplingParams
from quire.scheduler.draft_planner import DraftPlanner
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.step_times import StepCurve, StepTimes
from quire.speculative_config import SpeculativeConfig
from quire.step import StepPlan, TokenLogprobs

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.filterwarnings(
        "ignore:(overflow|invalid value|divide by zero|All-NaN slice) encountered:RuntimeWarning"
    ),
]

ONE_GROUP = [KVGroup("full", 0, (0,))]
CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rope=RopeConfig(),
    layer_windows=(0,),
    checkpoint_dtype="float32",
    qk_norm=True,
    tie_word_embeddings=True,
)
MAX_NUM_SEQS, BLOCK_SIZE = 8, 16
Replayed = tuple[GraphKey, StepPlan]
Found = dict[str, tuple[list[int], list[TokenLogprobs]]]


class FakeGraph:
    def __init__(self, run: Callable[[], Tensor]) -> None:
        run()
        self._run, self.result = run, run()

    def replay(self) -> None:
        self.result.copy_(self._run())


def fake_capture(run: Callable[[], Tensor], *, first: bool) -> tuple[FakeGraph, Tensor]:
    graph = FakeGraph(run)
    return graph, graph.result


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """The steps that were replayed; none waited for a capture. Prefixes are shared wherever they can be."""
    steps: list[Replayed] = []
    launched: list[StepPlan] = []
    replay, capture_one, launch = DecodeGraphs.replay, DecodeGraphs.capture_one, ModelRunner.launch

    def launching(self: ModelRunner, plan: StepPlan) -> PendingStep:
        launched.append(plan)
        pending = launch(self, plan)
        launched.clear()
        return pending

    def capturing(self: DecodeGraphs, *, idle: bool) -> None:
        assert not launched, "inside a step"
        capture_one(self, idle=idle)

    monkeypatch.setattr(ModelRunner, "launch", launching)
    monkeypatch.setattr(DecodeGraphs, "capture_one", capturing)

    def noted(self: DecodeGraphs, key: GraphKey, inputs: Any) -> Tensor:
        steps.append((key, launched[-1]))
        return replay(self, key, inputs)

    monkeypatch.setattr(DecodeGraphs, "replay", noted)
    monkeypatch.setitem(PlanBuffers.__init__.__kwdefaults__, "min_shared_bytes", -math.inf)
    if not torch.cuda.is_available():
        card = SimpleNamespace(multi_processor_count=1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    return steps


def make_core(
    backend: str, device: torch.device, *, captures: bool = False, speculation: DraftPlanner | None = None
) -> EngineCore:
    kernels = kernels_for(backend)
    weights: Any = RandomWeights(3)
    if backend != "cpu":
        weights = DeviceWeights(weights, device, torch.float32)
    shapes = kernels.kv_cache_shapes(80, CONFIG.num_kv_heads, BLOCK_SIZE, CONFIG.head_dim)
    capture: Any = CudaCapture if device.type == "cuda" else lambda: fake_capture
    runner = ModelRunner(
        load_model(CONFIG, weights, kernels, "float32"),
        KVCache(groups=ONE_GROUP, shapes=shapes, block_size=BLOCK_SIZE, dtype=torch.float32, device=device),
        CONFIG,
        kernels,
        RunnerSettings(
            backend=backend,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=128,
            max_model_len=256,
            num_threads=1,
            logprobs_memory=2**20,
            sample_on_device=backend != "cpu",
            max_num_samples=MAX_NUM_SEQS + 8,
        ),
        capture=capture() if captures else None,
    )
    scheduler = Scheduler(
        BlockPool(80, BLOCK_SIZE, enable_prefix_caching=True),
        SchedulerLimits(
            max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=128, max_model_len=256, max_num_partial_prefills=4
        ),
        speculation=speculation,
    )
    grammars = GrammarCache(lambda: pytest.fail("no grammars"), 1, 1)
    return EngineCore(scheduler, runner, grammars, None, vocab_size=300, max_logprobs=5, overlaps=backend != "cpu")


def run(core: EngineCore, requests: list[Request]) -> Found:
    found: Found = {request.request_id: ([], []) for request in requests}
    for request in requests:
        core.add(request)
    while core.has_work:
        for delta in core.step():
            tokens, reports = found[delta.request_id]
            tokens += delta.token_ids
            reports += [*(delta.prompt_logprobs or ()), *(delta.logprobs or ())]
    return found


def assert_same(found: Found, expected: Found) -> None:
    assert found.keys() == expected.keys()
    for request_id, (tokens, reports) in expected.items():
        assert found[request_id][0] == tokens, request_id
        for one, other in zip(found[request_id][1], reports, strict=True):
            assert (one.token_ids, one.ranks) == (other.token_ids, other.ranks)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def requests_of(name: str, count: int, max_tokens: int, prompt: list[int], **params: Any) -> list[Request]:
    """Sequences behind one prompt, some of them drawn at random."""
    ways: list[dict[str, Any]] = [{"temperature": 0.0}] * 6
    ways[1:3] = {"temperature": 1.2, "seed": 7}, {"temperature": 0.8, "seed": 5, "top_k": 20, "min_p": 0.01}
    return [
        Request(
            request_id=f"{name}-{index}",
            prompt_token_ids=[*prompt, (17 * index) % 300],
            params=SamplingParams(**{**ways[index % 6], **params}, max_tokens=max_tokens, ignore_eos=True),
            max_tokens=max_tokens,
        )
        for index in range(count)
    ]


def test_captured_steps_give_the_tokens_of_a_cpu(device: torch.device, replayed: list[Replayed]) -> None:
    """Batches behind a prefix that is worth sharing, that need their logits on the host, and that need neither: eager
    at first, captured in idle moments, replayed."""
    prefix = [(7 * place) % 300 for place in range(BLOCK_SIZE)]
    batches = [
        requests_of("shared", 8, 6, prefix),
        requests_of("alone", 2, 6, [3, 4]),
        requests_of("reported", 2, 6, [8], logprobs=3, prompt_logprobs=1),
        requests_of("penalised", 2, 6, [5], presence_penalty=0.5),
    ]
    plain, captured = make_core("cpu", torch.device("cpu")), make_core("triton", device, captures=True)
    for batch in batches:
        expected = run(plain, batch)
        assert_same(run(captured, batch), expected)
        while captured.has_idle_work:
            assert not captured.step()
        assert_same(run(captured, batch), expected)
    assert {key for key, _ in replayed} >= {
        GraphKey(8, (16, 64), Outcome.TOKENS),
        GraphKey(2, (16, 0), Outcome.TOKENS),
        GraphKey(2, (16, 0), Outcome.LOGPROBS),
        GraphKey(2, (16, 0), Outcome.LOGITS),
    }


def test_captured_drafts_give_the_tokens_of_a_cpu(
    device: torch.device, replayed: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps that draw and report on the device, and that need their logits on the host; the longest drafts are not
    captured."""
    monkeypatch.setattr(StepTimes, "curve", lambda *_: StepCurve([(1, 1.0)]))  # whatever is drafted is computed
    monkeypatch.setattr(cuda_graphs, "EAGER_STEPS", 1)
    monkeypatch.setattr(cuda_graphs, "graph_sizes", lambda most: [8, most])
    batches = [
        requests_of("reported", 2, 10, list(range(60)), logprobs=3),
        requests_of("penalised", 2, 8, list(range(60)), presence_penalty=0.5, temperature=1.0),
    ]
    plain = make_core("cpu", torch.device("cpu"))
    speculation = DraftPlanner(SpeculativeConfig(num_speculative_tokens=8, prompt_lookup_min=1))
    captured = make_core("triton", device, captures=True, speculation=speculation)
    for batch in batches:
        expected = run(plain, batch)
        for _ in range(2):
            assert_same(run(captured, batch), expected)
            while captured.has_idle_work:
                assert not captured.step()
    stats = captured.stats()
    assert stats.total_draft_tokens > stats.total_accepted_tokens > 5
    assert {key.outcome for key, plan in replayed if plan.drafts} == {Outcome.LOGPROBS, Outcome.LOGITS}
    assert max(max(plan.num_scheduled_tokens) for _, plan in replayed) in range(2, 9)
    # Two heads share a KV head, so that 8 tokens are 16 rows: one kind with steps that draft nothing.
    assert {key.variant for key, _ in replayed} == {(16, 0)}
