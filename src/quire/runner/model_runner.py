"""ModelRunner: executes a StepPlan with a model, its KV cache and the sampler.

One step, read from top to bottom in `launch`: take in rows and block tables, copy blocks that are about to be written,
lay out the inputs, plan attention once for all layers, run the model while a thread computes what grammars forbid, draw
samples. It decides nothing.

On a CPU a step has ended when it is launched. On a device it need not have: where all samples are drawn there, nothing
waits, the next step may be launched, and its plan names a token that is drawn but not known by the row that has it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quire.attention import AttentionShape, StepArrays, make_planner
from quire.backends import BACKENDS, MAX_NARROW_TOKENS
from quire.errors import DeviceMemoryError
from quire.grammar.cache import GrammarCache
from quire.kernels.interface import AttentionPlan, Kernels, OutputTokens
from quire.kernels.transfer import send, to_device
from quire.kv_cache.storage import KVCache
from quire.model_config import ModelConfig
from quire.models.registry import Model
from quire.runner.block_store import BlockStore
from quire.runner.cuda_graphs import Capture, DecodeGraphs, GraphKey, Outcome, is_out_of_memory
from quire.runner.input_batch import InputBatch, Int32Array, make_input_batch
from quire.runner.output_selection import OutputSelection, select_outputs
from quire.runner.request_rows import RequestRows
from quire.runner.sampling_metadata import SamplingMetadata, make_sample_points
from quire.sampling.device_sampler import (
    KERNEL_COLUMNS,
    DeviceSampler,
    draws_only,
    read_draws,
    read_reports,
    reports_on_device,
)
from quire.sampling.logits_processors import BatchLogitsProcessor
from quire.sampling.logprobs import token_logprobs
from quire.sampling.sampler import Sampler, SampleResult
from quire.sampling.state import SamplingState
from quire.sampling.structured_output import GrammarState, MaskWorker
from quire.step import StepPlan, StepResult, TokenLogprobs, logprob_bytes

logger = logging.getLogger(__name__)


class PendingStep:
    """A step that was launched."""

    def __init__(self, result: StepResult, finishes: Sequence[Callable[[], None]] = ()) -> None:
        """`finishes` wait for what is not there yet and put it into `result`."""
        self._result = result
        self._finishes = finishes

    @property
    def ready(self) -> bool:
        """Whether `result` need not wait."""
        return not self._finishes

    def result(self) -> StepResult:
        """What came out, when it has. The lists are in the order of `plan.sample_rows`."""
        finishes, self._finishes = self._finishes, ()
        for finish in finishes:
            finish()
        return self._result


class ModelRunner:
    """Owns the model, the KV tensors and the rows."""

    def __init__(
        self,
        model: Model,
        kv_cache: KVCache,
        model_config: ModelConfig,
        kernels: Kernels,
        *,
        backend: str,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        num_threads: int,
        logprobs_memory: int,
        logits_processors: Sequence[BatchLogitsProcessor] = (),
        block_store: BlockStore | None = None,
        grammars: GrammarCache | None = None,
        fast_forward: bool = True,
        batch_invariant: bool = False,
        draws_on_device: bool = False,
        capture: Capture | None = None,
        max_num_samples: int = 0,
    ) -> None:
        """`grammars` holds those of the requests that will come; `fast_forward` takes what they force for granted.

        `batch_invariant`: no bit of a sequence's logits depends on what shares its step. With `draws_on_device` a step
        whose samples are no more than draws does not wait for them. With `capture` steps of decoding become graphs, of
        up to `max_num_samples` tokens where that is more than sequences: drafted ones.
        """
        self._inference = torch.inference_mode()
        self._block_store = block_store
        self._model = model
        self._kv_cache = kv_cache
        self._config = model_config
        self._kernels = kernels
        self._max_model_len = max_model_len
        self._num_threads = num_threads
        windows = set(model_config.layer_windows) or {0}
        max_blocks = -(-max_model_len // kv_cache.block_size)
        self._rows = RequestRows(
            max_num_seqs=max_num_seqs,
            max_blocks=max_blocks,
            vocab_size=model_config.vocab_size,
            grammars=grammars,
            fast_forward=fast_forward and not logits_processors,  # they are there to see every token's logits
        )
        self._logprobs_memory = logprobs_memory
        self._sampler = Sampler(model_config.vocab_size, logprobs_memory, logits_processors)
        self._masks = MaskWorker(model_config.vocab_size, num_threads=max(1, num_threads // 2))
        self._plan_attention = make_planner(
            backend,
            AttentionShape(
                num_heads=model_config.num_heads,
                num_kv_heads=model_config.num_kv_heads,
                head_dim=model_config.head_dim,
                block_size=kv_cache.block_size,
                # With one window for all layers the plan leaves out keys that no layer sees.
                window=0 if 0 in windows else max(windows),
                max_num_seqs=max_num_seqs,
                max_num_tokens=max_num_batched_tokens,
                max_blocks=max_blocks,
                num_threads=num_threads,
                kv_element_size=kv_cache.element_size,
                batch_invariant=batch_invariant,
                device=kv_cache.device,
            ),
        )
        self._replans = BACKENDS[backend].replans
        self._logits_are_ready = BACKENDS[backend].float32_activations
        """Float32, and on the host."""
        self._device = kv_cache.device
        self._device_sampler: DeviceSampler | None = None
        if draws_on_device and not logits_processors:
            module = BACKENDS[backend].sampling
            kernels_of_sampling = import_module(module) if module else None
            self._device_sampler = DeviceSampler(model_config.vocab_size, kernels_of_sampling)
        self._no_row = np.int32(max_num_seqs)
        self._last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=self._device)
        """Per row, the token that was last drawn on the device; and a place for what no step will ask for."""
        self._graphs: DecodeGraphs | None = None
        if capture is not None:
            padding = {
                **KERNEL_COLUMNS,
                "input_ids": np.int32(0),
                "token_positions": np.int32(0),
                "rows": self._no_row,
            }
            self._graphs = DecodeGraphs(
                self._prepare_captured,
                capture,
                padding=padding,
                max_num_tokens=min(max(max_num_seqs, max_num_samples), max_num_batched_tokens),
                device=self._device,
            )
        self._pending = PendingStep(StepResult())
        """The step launched last."""
        self._batch: InputBatch | None = None
        self._points: SamplingMetadata | None = None
        """Those of the step before, unless it computed nothing."""
        self._sent: Mapping[str, torch.Tensor] | None = None
        """On a CPU, the arrays of that batch: those of one that follows lie where they were."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step to its end."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> PendingStep:
        """Run one step, as far as the host need not wait for it. At most the step before it may be pending.

        Raises `DeviceMemoryError` where a device has too little memory for it. Nothing was drawn then, and what was
        written will be written again.
        """
        # OpenMP keeps it for each thread that calls, and whoever steps need not be who loaded the model.
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
        try:
            with self._inference:
                self._pending = self._launch(plan)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._masks.join()
            if self._graphs is not None:
                self._graphs.forget()
            self._empty_cache()
            raise DeviceMemoryError(f"a step of {plan.num_tokens} tokens: {error}") from error
        return self._pending

    @property
    def has_idle_work(self) -> bool:
        """Whether there is something to prepare for steps to come."""
        return self._graphs is not None and self._graphs.is_wanted

    def prepare(self, *, idle: bool) -> None:
        """Make steps to come faster, between two steps or, if `idle`, while nothing is to be done: capture one."""
        if self._graphs is None:
            return
        try:
            with self._inference:
                self._graphs.capture_one(idle=idle)
        except RuntimeError as error:
            if is_out_of_memory(error):
                logger.warning("no memory for a CUDA graph: %s; steps of its size run without", error)
            else:
                logger.warning("a step could not be captured: %s; all run without CUDA graphs", error)
        else:
            return
        self._empty_cache()  # now that nothing that failed is held by the error

    def _launch(self, plan: StepPlan) -> PendingStep:
        self._rows.apply(plan)
        load_seconds = 0.0
        if self._block_store is not None and plan.offload is not None:
            load_seconds = self._block_store.move(plan.offload)
        result = StepResult()
        finishes: list[Callable[[], None]] = []
        if plan.rows:
            finishes = self._compute(plan, result)
        else:
            self._batch = None
        if self._block_store is not None:
            result.offload = self._block_store.collect(wait=plan.offload is not None and plan.offload.wait)
            result.offload.load_seconds = load_seconds
        return PendingStep(result, finishes)

    def close(self) -> None:
        """Let go of files."""
        if self._block_store is not None:
            self._block_store.close()

    def _compute(self, plan: StepPlan, result: StepResult) -> list[Callable[[], None]]:
        """Fill `result`, or say how it will be filled when the device is done."""
        batch, points = self._lay_out(plan)
        if points.grammars:
            self._masks.start(points.grammars)
        self._copy_blocks(plan)
        sampler = self._device_sampler if self._draws_on_device(plan, points) else None
        inputs: dict[str, NDArray[Any]] = {"input_ids": batch.input_ids, "token_positions": batch.positions}
        if sampler is not None:
            # Which of the tokens behind a draft hold is for the host to say, before any of them is computed.
            keeping = np.full(len(points.states), self._no_row) if plan.drafts else points.rows
            inputs |= {"rows": keeping, **sampler.columns(points.states)}
        size = 0
        if self._graphs is not None and points.after_every_token and not plan.prompt_logprobs:
            size = self._graphs.size_for(plan.num_tokens) if max(plan.num_scheduled_tokens) <= MAX_NARROW_TOKENS else 0
        attention = self._plan_attention(
            StepArrays(batch.query_start_loc, batch.seq_lens, batch.block_tables, batch.slots),
            captured_tokens=size,
            repeats=batch.follows,
        )
        outcome = Outcome.LOGITS
        if sampler is not None:
            outcome = Outcome.REPORTS if inputs["nums_reported"].any() else Outcome.TOKENS
        key = GraphKey(size, attention.variant, outcome)
        drawn = logits = hidden = read = None
        if self._graphs is not None and size and self._graphs.has(key):
            replayed = self._graphs.replay(key, inputs)
            drawn, logits = (None, replayed[: plan.num_tokens]) if sampler is None else (replayed, None)
        else:
            read = select_outputs(plan, points, batch)
            sampled = points.tokens if read is None else read.places(points.tokens)
            tokens_read = points.tokens if read is None else read.tokens
            sent = self._sent if batch.follows and points.after_every_token else None
            if sent is None:
                sent = send({**inputs, "sampled": sampled, "tokens_read": tokens_read}, self._device)
                self._sent = sent if self._device.type == "cpu" and self._device_sampler is None else None
            input_ids = sent["input_ids"]
            if self._device_sampler is not None and (batch.input_ids < 0).any():
                input_ids = self._known(input_ids)
            output_tokens = None if read is None else OutputTokens(sent["tokens_read"], self._plan_read(batch, read))
            hidden = self._model(input_ids, sent["token_positions"], self._kv_cache, attention, output_tokens)
            if points.after_every_token:
                logits = self._model.logits(hidden)
            elif plan.sample_indices:
                logits = self._logits(hidden, sampled, sent["sampled"])
            if sampler is not None and logits is not None:
                drawn = self._draw(sampler, logits, sent, outcome)
        finishes: list[Callable[[], None]] = []
        if points.grammars:
            self._masks.join()
        if plan.prompt_logprobs:
            assert hidden is not None, "a step that is captured is asked for none"
            finishes += self._tell_prompts(plan, batch, read, hidden, result)
        if drawn is not None:
            finishes.append(self._promise(plan, points, drawn, result))
        elif logits is not None:
            self._pending.result()  # what was drawn before decides what may be drawn now
            logits = logits if self._logits_are_ready else logits.float().cpu()
            sampled_on_host = self._sampler.sample(logits, points.states, passing=bool(plan.drafts))
            self._take_in(plan, points, sampled_on_host, result)
            for finish in finishes:
                finish()
            return []  # the step after must not be planned on tokens that the device has not drawn
        return finishes

    def _lay_out(self, plan: StepPlan) -> tuple[InputBatch, SamplingMetadata]:
        """The step's tokens, and where samples are drawn: that stays as it is while the same sequences decode."""
        batch, points = make_input_batch(plan, self._rows, self._kv_cache.block_size, self._batch), self._points
        if points is None or not (batch.follows and points.after_every_token and plan.sample_rows == plan.rows):
            points = make_sample_points(plan, self._rows.sampling_states(plan.sample_rows))
        self._batch, self._points = batch, points
        return batch, points

    def _plan_read(self, batch: InputBatch, read: OutputSelection) -> AttentionPlan | None:
        """The last layer's attention."""
        if not self._replans:
            return None
        tables, slots = batch.block_tables[read.sequences], batch.slots[read.tokens]
        return self._plan_attention(StepArrays(read.query_start_loc, batch.seq_lens[read.sequences], tables, slots))

    def _copy_blocks(self, plan: StepPlan) -> None:
        if plan.block_copies:
            pairs = to_device(np.array(plan.block_copies, dtype=np.int32), self._device)
            self._kernels.copy_blocks(self._kv_cache.layers, pairs)

    def _prepare_captured(self, key: GraphKey, inputs: Mapping[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
        """A step of decoding over fixed inputs, down to drawn tokens or logits, planned without any sequence."""
        tables, no_tokens = np.zeros((0, 1), dtype=np.int32), np.zeros(0, dtype=np.int32)
        nothing = StepArrays(np.zeros(1, dtype=np.int32), no_tokens, tables, no_tokens)
        attention = self._plan_attention(nothing, captured_tokens=key.size, variant=key.variant)
        sampler = None if key.outcome is Outcome.LOGITS else self._device_sampler

        def run() -> torch.Tensor:
            input_ids = self._known(inputs["input_ids"])
            logits = self._model.logits(self._model(input_ids, inputs["token_positions"], self._kv_cache, attention))
            return logits if sampler is None else self._draw(sampler, logits, inputs, key.outcome)

        return run

    def _known(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids, with those put in that were drawn on the device and are named by `~row`."""
        drawn = self._last_tokens.index_select(0, (~input_ids).clamp_(min=0))
        return torch.where(input_ids < 0, drawn, input_ids)

    def _draws_on_device(self, plan: StepPlan, points: SamplingMetadata) -> bool:
        return self._device_sampler is not None and bool(plan.sample_indices) and all(map(draws_only, points.states))

    def _logits(self, hidden: torch.Tensor, places: Int32Array, places_on_device: torch.Tensor) -> torch.Tensor:
        """A row of logits for each sample, which the sampler may overwrite."""
        rows, place = np.unique(places, return_inverse=True)
        if len(rows) == len(places):
            return self._model.logits(hidden[places_on_device])
        # Where a prompt ends and n samples part, each draws from a copy.
        return self._model.logits(hidden[to_device(rows, self._device)])[to_device(place, self._device)]

    def _draw(
        self, sampler: DeviceSampler, logits: torch.Tensor, inputs: Mapping[str, torch.Tensor], outcome: Outcome
    ) -> torch.Tensor:
        """Draw on the device, and keep the tokens there for the step that computes them."""
        drawn = sampler.draw(logits, inputs, reports=outcome is Outcome.REPORTS)
        self._last_tokens.index_copy_(0, inputs["rows"].long(), drawn[0])
        return drawn

    def _promise(
        self, plan: StepPlan, points: SamplingMetadata, drawn: torch.Tensor, result: StepResult
    ) -> Callable[[], None]:
        """What is returned waits for the drawn tokens, behind which may be those of padding, and fills `result`."""
        fetch = _fetch(drawn)
        states = points.states
        if plan.drafts:  # no step is planned before it is known which of them held
            return lambda: self._take_in(plan, points, read_draws(fetch(), states), result)
        places = [state.promise() for state in states]

        def finish() -> None:
            sampled = read_draws(fetch(), states)
            result.token_ids, result.logprobs, result.errors = sampled.token_ids, sampled.logprobs, sampled.errors
            for state, place, token_id in zip(states, places, result.token_ids, strict=True):
                state.keep(place, token_id)

        return finish

    def _take_in(self, plan: StepPlan, points: SamplingMetadata, sampled: SampleResult, result: StepResult) -> None:
        """Let the sequences take what was sampled, of drafts as far as they hold."""
        result.token_ids, result.logprobs, result.errors = sampled.token_ids, sampled.logprobs, sampled.errors
        if points.outputs is not None and not any(sampled.errors):
            for output_token_ids, token_id in zip(points.outputs, sampled.token_ids, strict=True):
                output_token_ids.append(token_id)
            return
        firsts = points.first[:-1]
        if plan.drafts:
            result.token_ids = [sampled.token_ids[first] for first in firsts]
            result.logprobs = [sampled.logprobs[first] for first in firsts]
            result.errors = [sampled.errors[first] for first in firsts]
        for index, (first, token_id, error) in enumerate(zip(firsts, result.token_ids, result.errors, strict=True)):
            if first in sampled.candidates:
                result.candidates[index] = sampled.candidates[first]
            elif error is None:
                state = points.states[first]
                state.append(token_id)
                if index not in plan.drafts and state.grammar is None:
                    continue
                following: list[int] = []
                if index in plan.drafts:
                    drafted = range(first + 1, points.first[index + 1])
                    following, logprobs = self._accept(sampled, drafted, plan.drafts[index], state)
                    if logprobs:
                        result.extra_logprobs[index] = logprobs
                if state.grammar is not None:
                    following += self._follow_grammar(index, state, state.grammar, result)
                if following:
                    result.extra_token_ids[index] = following

    @staticmethod
    def _accept(
        sampled: SampleResult, points: range, draft: list[int], state: SamplingState
    ) -> tuple[list[int], list[TokenLogprobs]]:
        """Let a sequence take the samples at `points`, after its drafted tokens, as far as these are what was drawn.

        A sample that failed is drawn again, and fails again, in the next step.
        """
        following: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for point in points:
            if sampled.token_ids[point - 1] != draft[len(following)] or sampled.errors[point] is not None:
                break
            if state.grammar is not None and not state.grammar.has_choice:
                break
            state.append(sampled.token_ids[point])
            following.append(sampled.token_ids[point])
            logprob = sampled.logprobs[point]
            if logprob is not None:
                logprobs.append(logprob)
        return following, logprobs

    def _follow_grammar(self, index: int, state: SamplingState, grammar: GrammarState, result: StepResult) -> list[int]:
        """Take the tokens that can only come next, and see whether the text is complete."""
        # Never more than the request may have: a grammar can force a million tokens.
        limit = min(state.params.max_tokens or self._max_model_len, self._max_model_len) - state.position
        forced = state.take_forced(limit)
        if grammar.complete:
            result.terminated.append(index)
        return forced

    def _empty_cache(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _tell_prompts(
        self,
        plan: StepPlan,
        batch: InputBatch,
        read: OutputSelection | None,
        hidden: torch.Tensor,
        result: StepResult,
    ) -> list[Callable[[], None]]:
        """Fill in log-probabilities of prompts, or say how they will be filled in."""
        finishes: list[Callable[[], None]] = []
        for index, (num_logprobs, targets) in plan.prompt_logprobs.items():
            first = batch.query_start_loc[index : index + 1]
            place = int(first[0] if read is None else read.places(first)[0])
            entries: list[TokenLogprobs] = []
            result.prompt_logprobs[index] = entries
            # Logits of a long prompt would be larger than its KV: as many positions exist at once as the plan has room
            # for.
            num_rows = max(1, self._logprobs_memory // logprob_bytes(self._config.vocab_size, num_logprobs))
            for start in range(0, len(targets), num_rows):
                tokens = targets[start : start + num_rows]
                logits = self._model.logits(hidden[place + start : place + start + len(tokens)])
                if self._device_sampler is None or not reports_on_device(num_logprobs):
                    entries += token_logprobs(logits.float().cpu(), tokens, num_logprobs)
                    continue
                nums_reported = np.full(len(tokens), 1 + num_logprobs, dtype=np.int32)
                asked = send({"tokens": np.array(tokens, dtype=np.int32), "nums_reported": nums_reported}, self._device)
                fetch = _fetch(self._device_sampler.report(logits, asked["tokens"], asked["nums_reported"]))
                finishes.append(partial(_add_reports, entries, fetch, tokens, num_logprobs))
        return finishes


def _add_reports(
    entries: list[TokenLogprobs], fetch: Callable[[], NDArray[np.int32]], token_ids: list[int], num_logprobs: int
) -> None:
    entries += read_reports(fetch(), token_ids, [num_logprobs] * len(token_ids))


def _fetch(tensor: torch.Tensor) -> Callable[[], NDArray[np.int32]]:
    """Begin to copy a tensor, which the next step may overwrite, to the host. What is returned waits for the copy."""
    if tensor.device.type == "cpu":
        tensor = tensor.clone()
    if tensor.device.type != "cuda":
        return lambda: tensor.cpu().numpy()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> NDArray[np.int32]:
        copied.synchronize()
        return host.numpy()

    return wait
