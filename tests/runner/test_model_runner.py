"""The runner's paths give the same tokens: host or device sampling, eager or captured, one step at a time or ahead.

The model is a function of a token and its position, so that no path needs attention, and graphs run on a CPU.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.errors import DeviceMemoryError
from quire.kernels import AttentionPlan, cpu, kernels_for
from quire.kv_cache.storage import KVCache
from quire.kv_groups import KVGroup
from quire.layers.step_context import StepContext
from quire.runner.cuda_graphs import EAGER_STEPS, Outcome
from quire.runner.model_runner import ModelRunner, PendingStep, RunnerSettings
from quire.sampling.device_sampler import DeviceSampler
from quire.sampling.uniforms import uniforms
from quire.sampling_params import SamplingParams
from quire.step import NewRow, StepPlan, StepResult

VOCAB_SIZE, BLOCK_SIZE, NUM_STEPS = 50, 4, 30
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.2, "top_k": 9},
    {"temperature": 0.8, "top_p": 0.7},
]


class TableModel:
    """Hidden states are tokens and positions; logits are looked up for them."""

    image_encoder = None
    pooler = None

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.by_token = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator)
        self.by_position = torch.randn(64, VOCAB_SIZE, generator=generator)
        self.error: RuntimeError | None = None

    def __call__(self, input_ids: Tensor, context: StepContext) -> Tensor:
        if self.error is not None:
            raise self.error
        hidden = torch.stack((input_ids, context.positions), dim=1)
        return hidden if context.output_tokens is None else hidden[context.output_tokens.tokens]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.by_token[hidden[:, 0].long()] + self.by_position[hidden[:, 1].long()]

    def scale_kv(self) -> None: ...


class HostKernels:
    """Sampling kernels whose columns have fixed types, as a captured step needs: those of the host."""

    SamplingRows = SimpleNamespace

    def sample(self, logits: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
        max_logits, ids = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.int32)
        numbers = uniforms(rows.keys.numpy().view(np.uint64), rows.positions.numpy().astype(np.uint64))
        greedy = rows.temperature == 0
        temperature = torch.where(greedy, 1.0, rows.temperature)
        top_k = torch.where(rows.top_k < logits.shape[1], rows.top_k, 0)
        filters = (temperature, rows.min_p, top_k, rows.top_p)
        cpu.sample_tokens(logits, *filters, torch.from_numpy(numbers), max_logits, ids)
        return torch.where(greedy, logits.argmax(1).int(), ids), max_logits

    def report(self, logits: Tensor, tokens: Tensor, num_entries: Tensor, max_logprobs: int) -> Tensor:
        return DeviceSampler(VOCAB_SIZE).logprobs(logits, tokens, num_entries)


class FakeGraph:
    """Runs again what it recorded."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run, self.result = run, run()

    def replay(self) -> None:
        self.result.copy_(self._run())


def fake_capture(run: Callable[[], Tensor], *, first: bool) -> tuple[FakeGraph, Tensor]:
    graph = FakeGraph(run)
    return graph, graph.result


def make_runner(backend: str, *, captures: bool = False) -> ModelRunner:
    sizes = {"vocab_size": VOCAB_SIZE, "num_heads": 1, "num_kv_heads": 1, "head_dim": 32, "pixels_per_position": 0}
    config: Any = SimpleNamespace(**sizes, latent=None, is_encoder=False, tokens_of_whole_images=0)
    kernels = kernels_for(backend)
    runner = ModelRunner(
        TableModel(),
        KVCache(
            groups=[KVGroup("full", 0, (0,))],
            shapes=kernels.kv_cache_shapes(64, 1, BLOCK_SIZE, 32),
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
        ),
        config,
        kernels,
        RunnerSettings(
            backend=backend,
            max_num_seqs=len(PARAMS) + 2,
            max_num_batched_tokens=64,
            max_model_len=64,
            num_threads=torch.get_num_threads(),
            logprobs_memory=2**20,
            sample_on_device=backend != "cpu",
        ),
        capture=fake_capture if captures else None,
    )
    if captures:  # a CPU has no backend that plans captured steps
        runner._device_sampling._sampler._kernels = HostKernels()  # type: ignore[union-attr]
        runner._plan_attention = (
            lambda steps, **options: (  # type: ignore[assignment]
                AttentionPlan(*map(torch.from_numpy, steps[0][:4]), window=0),
            )
        )
    return runner


class Run:
    """Sequences that decode together, as a scheduler would let them."""

    def __init__(self, runner: ModelRunner, params: list[dict[str, Any]]) -> None:
        self.runner = runner
        self.rows = list(range(1, 1 + len(params)))
        self.tokens: list[list[int]] = [[row] for row in self.rows]
        self.logprobs: list[Any] = []
        self.position, self.batch_id = 0, 1
        self.new_rows = [
            NewRow(row, SamplingParams(**each), [row], [], seed=row, sample_index=0, stop_token_ids=(0,))
            for row, each in zip(self.rows, params, strict=True)
        ]

    def plan(self, *, ahead: bool) -> StepPlan:
        """The next step. `ahead`: the tokens of the last one are not known yet."""
        plan = StepPlan(
            batch_id=self.batch_id if self.position else 0,
            rows=self.rows,
            num_computed_tokens=[self.position] * len(self.rows),
            num_scheduled_tokens=[1] * len(self.rows),
            token_ids=[~row for row in self.rows] if ahead else [tokens[-1] for tokens in self.tokens],
            sample_rows=self.rows,
            sample_indices=list(range(len(self.rows))),
            new_rows=self.new_rows,
        )
        if self.position % BLOCK_SIZE == 0:
            index = self.position // BLOCK_SIZE
            plan.new_blocks = [(row, 0, index, [8 * row + index]) for row in self.rows]
        self.position, self.new_rows = self.position + 1, []
        return plan

    def take(self, result: StepResult) -> None:
        assert result.errors == [None] * len(self.rows)
        for tokens, token_id in zip(self.tokens, result.token_ids, strict=True):
            tokens.append(token_id)
        self.logprobs.append(result.logprobs)

    def finish(self, *, ahead: bool = False) -> list[list[int]]:
        pending: PendingStep | None = None
        for _ in range(NUM_STEPS):
            launched = self.runner.launch(self.plan(ahead=pending is not None))
            if pending is not None:
                self.take(pending.result())
            pending = launched if ahead and not launched.ready else None
            if pending is None:
                self.take(launched.result())
            self.runner.prepare(idle=True)
        if pending is not None:
            self.take(pending.result())
        return self.tokens


def expected_tokens(params: list[dict[str, Any]]) -> list[list[int]]:
    return Run(make_runner("cpu"), params).finish()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("more", [{}, {"logprobs": 2}, {"min_tokens": 9}, {"presence_penalty": 0.5}], ids=str)
def test_every_path_samples_the_same(captures: bool, ahead: bool, more: dict[str, Any]) -> None:
    """With `min_tokens` a batch goes from the host to the device while it repeats; penalties stay on the host."""
    params = [{**each, **more} for each in PARAMS]
    runner = make_runner("sdpa", captures=captures)
    assert Run(runner, params).finish(ahead=ahead) == expected_tokens(params)
    if captures:
        assert runner._graphs is not None
        outcomes = {key.outcome for key in runner._graphs._graphs}
        wanted = {"logprobs": {Outcome.LOGPROBS}, "min_tokens": {Outcome.LOGITS, Outcome.TOKENS}}
        assert outcomes == wanted.get(next(iter(more), ""), {Outcome.LOGITS if more else Outcome.TOKENS})
        assert NUM_STEPS > 4 * EAGER_STEPS


def test_a_device_step_is_pending_and_a_host_step_is_not() -> None:
    for params, ready in ((PARAMS, False), ([{**PARAMS[1], "presence_penalty": 0.5}], True)):
        pending = make_runner("sdpa").launch(Run(make_runner("cpu"), params).plan(ahead=False))
        assert pending.ready == ready
        assert len(pending.result().token_ids) == len(params)
        assert pending.ready


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
def test_a_step_that_failed_can_run_again(backend: str) -> None:
    """With the same id, at the same positions: what the failed step advanced is laid out anew."""
    run = Run(make_runner(backend), PARAMS)
    model: Any = run.runner._model
    for step in range(NUM_STEPS):
        plan = run.plan(ahead=False)
        if step in (3, 4, 11):
            model.error = torch.OutOfMemoryError("CUDA out of memory")
            with pytest.raises(DeviceMemoryError, match="a step of 4 tokens: CUDA out of memory"):
                run.runner.launch(plan)
            model.error = None
            plan.new_rows = []
        run.take(run.runner.execute(plan))
    assert run.tokens == expected_tokens(PARAMS)
