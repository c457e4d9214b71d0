"""ModelRunner: executes a StepPlan with a model, its KV cache and the samplers. It decides nothing.

One step, from top to bottom: apply rows and block tables, move and copy blocks (`_launch`), lay out the inputs, plan
attention once for all layers, run the model, sample (`_compute`).

On a CPU a step has ended when it is launched. On a device it may still run: if all samples are made there, nothing
waits, and the next step can be launched. Its plan then writes `~row` for a token that the device has sampled for a row
but the host does not know.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from quire.attention import GroupPlanner, StepArrays, variant_of
from quire.backends import BACKENDS, MAX_NARROW_TOKENS
from quire.errors import DeviceMemoryError
from quire.grammar.cache import GrammarCache
from quire.kernels.interface import AttentionPlan, Kernels, OutputTokens
from quire.kernels.transfer import to_device
from quire.kv_cache.storage import KVCache
from quire.layers.step_context import StepContext
from quire.lora.slots import AdapterSlots
from quire.model_config import ModelConfig
from quire.models.registry import Model
from quire.runner.adapter_rows import AdapterRows
from quire.runner.block_store import BlockStore
from quire.runner.cuda_graphs import Capture, DecodeGraphs, GraphKey, Outcome, is_out_of_memory
from quire.runner.image_embeddings import ImageEmbeddings
from quire.runner.input_batch import Int32Array
from quire.runner.no_sampling import NoSampling
from quire.runner.recurrence import Recurrence
from quire.runner.request_rows import RequestRows
from quire.runner.results import Finish, PendingStep, PromptLogprobs, StepResults, fetch_vectors
from quire.runner.settings import RunnerSettings, attention_shapes
from quire.runner.step_inputs import SentInputs, StepInputBuilder, StepInputs
from quire.runner.step_samplers import DeviceSampling, HostSampling, StepSampler
from quire.sampling.device_sampler import DeviceSampler
from quire.sampling.logits_processors import BatchLogitsProcessor
from quire.sampling.sampler import Sampler
from quire.sampling.structured_output import MaskWorker
from quire.step import StepPlan, StepResult

__all__ = ["ModelRunner", "PendingStep", "RunnerSettings"]

logger = logging.getLogger(__name__)


class ModelRunner:
    """Owns the model, the KV tensors and the rows."""

    def __init__(
        self,
        model: Model,
        kv_cache: KVCache,
        model_config: ModelConfig,
        kernels: Kernels,
        settings: RunnerSettings,
        *,
        logits_processors: Sequence[BatchLogitsProcessor] = (),
        block_store: BlockStore | None = None,
        grammars: GrammarCache | None = None,
        capture: Capture | None = None,
    ) -> None:
        """`grammars` holds the compiled grammars of requests. With `capture`, steps of decoding become CUDA graphs."""
        vocab_size, device = model_config.vocab_size, kv_cache.device
        self._inference = torch.inference_mode()
        self._model = model
        self._kv_cache = kv_cache
        self._kernels = kernels
        self._device = device
        self._block_store = block_store
        self._reads_hidden = settings.reads_hidden
        self._count_threads = settings.count_threads or (lambda: settings.num_threads)
        self._rows = RequestRows(
            max_num_seqs=settings.max_num_seqs,
            max_blocks=-(-settings.max_model_len // kv_cache.block_size),
            num_groups=len(kv_cache.groups),
            vocab_size=vocab_size,
            grammars=grammars,
            fast_forward=settings.fast_forward and not logits_processors,  # they must see the logits of every token
            pixels_per_token=model_config.pixels_per_position,
        )
        self._inputs = StepInputBuilder(
            self._rows,
            kv_cache.block_size,
            device,
            pools_all_tokens=model.pooler is not None and model.pooler.reads_all_tokens,
        )
        self._plan_attention = GroupPlanner(settings.backend, attention_shapes(settings, model_config, kv_cache))
        self._recurrence = Recurrence(kv_cache)
        self._images = ImageEmbeddings(model.image_encoder, device)
        row = BACKENDS[settings.backend]
        self._plans_selection = row.replans
        results = StepResults(settings.max_model_len)
        self._host_sampling: HostSampling | NoSampling = NoSampling()
        if settings.samples:
            self._host_sampling = HostSampling(
                Sampler(vocab_size, settings.logprobs_memory, kernels, logits_processors),
                MaskWorker(vocab_size, num_threads=max(1, settings.num_threads // 2)),
                results,
                logits_are_ready=row.float32_activations,
            )
        device_sampler: DeviceSampler | None = None
        self._device_sampling: DeviceSampling | None = None
        if settings.sample_on_device and not logits_processors:
            device_sampler = DeviceSampler(vocab_size, import_module(row.sampling) if row.sampling else None)
            self._device_sampling = DeviceSampling(device_sampler, settings.max_num_seqs, results, device)
        self._adapters: AdapterRows | None = None
        self._prompt_logprobs = PromptLogprobs(self._logits_of, vocab_size, settings.logprobs_memory, device_sampler)
        self._graphs = None if capture is None else self._make_graphs(capture, settings)
        self._pending = PendingStep(StepResult())
        """The step launched last."""

    def use_adapters(self, slots: AdapterSlots) -> None:
        """Serve rows with the adapters in these slots of the model's layers."""
        self._rows.slot_of = slots.slot_of
        self._adapters = AdapterRows(slots.adapters, self._rows, self._kernels.LORA_TILE, self._device)

    # -- the engine's side --------------------------------------------------------------------------------------------

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step to its end."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> PendingStep:
        """Run one step, as far as the host need not wait for it. At most the step before it may be pending.

        Raises `DeviceMemoryError` if the device has too little memory for it. Nothing was sampled then, and the step
        can be run again: what it wrote will be overwritten.
        """
        # OpenMP keeps the number of threads per calling thread, and another thread may have loaded the model.
        if torch.get_num_threads() != (num_threads := self._count_threads()):
            torch.set_num_threads(num_threads)
        try:
            with self._inference:
                self._pending = self._launch(plan)
        except RuntimeError as error:
            self._inputs.clear()
            if not is_out_of_memory(error):
                raise
            self._host_sampling.cancel()
            if self._graphs is not None:
                self._graphs.clear()
            self._empty_cache()
            raise DeviceMemoryError(f"a step of {plan.num_tokens} tokens: {error}") from error
        return self._pending

    @property
    def has_idle_work(self) -> bool:
        """True if `prepare` has something to do."""
        return self._graphs is not None and self._graphs.has_pending_capture

    def prepare(self, *, idle: bool) -> None:
        """Make later steps faster, between two steps or, if `idle`, when there is nothing else to do: capture one."""
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
        self._empty_cache()  # only now: the error held on to the memory of what failed

    def close(self) -> None:
        """Close the files of the disk tier."""
        if self._block_store is not None:
            self._block_store.close()

    # -- one step -----------------------------------------------------------------------------------------------------

    def _launch(self, plan: StepPlan) -> PendingStep:
        self._rows.apply(plan)
        load_seconds = 0.0
        if self._block_store is not None and plan.offload is not None:
            self._block_store.store(plan.offload)
        if plan.state_copies and self._kv_cache.states is not None:
            self._kv_cache.states.copy(plan.state_copies)
        if self._block_store is not None and plan.offload is not None:
            load_seconds = self._block_store.load(plan.offload)
        result = StepResult()
        finishes: Sequence[Finish] = ()
        if plan.rows:
            finishes = self._compute(plan, result)
        else:
            self._inputs.clear()
        if self._block_store is not None:
            result.offload = self._block_store.collect(wait=plan.offload is not None and plan.offload.wait)
            result.offload.load_seconds = load_seconds
        return PendingStep(result, finishes)

    def _compute(self, plan: StepPlan, result: StepResult) -> Sequence[Finish]:
        """Fill `result`, or return what fills it when the device is done."""
        step = self._inputs.lay_out(plan)
        has_adapters = self._adapters is not None and self._adapters.begin(step)
        sampler = self._choose_sampler(step)
        columns = sampler.begin(step)
        self._copy_blocks(plan)
        size = 0 if self._graphs is None or has_adapters else self._captured_size(self._graphs, step)
        attention = self._plan_attention(
            step.attention_arrays, captured_tokens=size, repeats=step.repeats, images=step.image_runs
        )
        outcome = sampler.outcome(columns)
        finishes: list[Finish] = []
        if (
            self._graphs is not None
            and size
            and self._graphs.count_step(key := GraphKey(size, variant_of(attention), outcome))
        ):
            output = self._graphs.replay(key, {**step.arrays, **columns})
        else:
            sent = self._inputs.send(step, columns)
            hidden = self._run_model(step, sent, attention)
            if not self._reads_hidden:
                return finishes
            if plan.prompt_logprobs:
                finishes += self._prompt_logprobs.compute(step, sent, hidden, result)
            if plan.pool_rows:
                finishes.append(fetch_vectors(step, sent, hidden, self._model.pooler, result))
            if not plan.sample_indices:
                return finishes
            output = sampler.compute(self._sample_logits(step, sent, hidden), sent.tensors, outcome)
        if not sampler.waits:
            return [*finishes, *sampler.finish(output, step, result)]
        self._pending.result()  # the tokens of the step before decide what may be sampled now
        sampler.finish(output, step, result)
        # Nothing may stay pending: the next step must not be planned on tokens that the device has not sampled.
        for finish in finishes:
            finish()
        return ()

    def _choose_sampler(self, step: StepInputs) -> StepSampler:
        if self._device_sampling is not None and self._device_sampling.accepts(step):
            return self._device_sampling
        return self._host_sampling

    def _copy_blocks(self, plan: StepPlan) -> None:
        if plan.block_copies:
            pairs = to_device(np.array(plan.block_copies, dtype=np.int32), self._device)
            self._kernels.copy_blocks(self._kv_cache.parts, pairs)

    def _run_model(self, step: StepInputs, sent: SentInputs, attention: Sequence[AttentionPlan]) -> Tensor:
        """Hidden states of the step's tokens, or of those selected."""
        input_ids = sent.tensors["input_ids"]
        if self._device_sampling is not None and (step.batch.input_ids < 0).any():
            input_ids = self._device_sampling.fill_in(input_ids)
        output_tokens = None
        if sent.selection is not None:
            selected: AttentionPlan | None = None
            if self._plans_selection:
                last = self._kv_cache.layers[-1].group
                selected = self._plan_attention.plan_group(step.selected_arrays(sent.selection, last), last)
            output_tokens = OutputTokens(sent.tensors["output_tokens"], selected)
        grid = step.batch.grid_positions
        context = StepContext(
            sent.tensors["token_positions"],
            self._kv_cache.layers,
            attention,
            output_tokens,
            state_layers=() if self._kv_cache.states is None else self._kv_cache.states.layers,
            token_types=sent.tensors.get("token_types"),
            text_starts=step.batch.query_start_loc.tolist() if step.plan.pool_rows else None,
            recurrence=self._recurrence.plan(step),
            grid_positions=None if grid is None else to_device(grid, self._device),
            input_rows=None if step.plan.images is None else self._images.apply(step.plan.images),
        )
        if self._adapters is not None:
            self._adapters.enter_model(sent)
        return self._model(input_ids, context)

    def _sample_logits(self, step: StepInputs, sent: SentInputs, hidden: Tensor) -> Tensor:
        """A row of logits for each sample, which the sampler may overwrite."""
        tokens = step.sampling.tokens
        if step.sampling.after_every_token:
            return self._logits_of(hidden, None)
        rows, inverse = np.unique(sent.sampled, return_inverse=True)
        if len(rows) == len(sent.sampled):
            return self._logits_of(hidden[sent.tensors["sampled"]], tokens)
        # The n samples that part where a prompt ends each get a copy of its logits.
        logits = self._logits_of(hidden[to_device(rows, self._device)], np.unique(tokens))
        return logits[to_device(inverse, self._device)]

    def _logits_of(self, hidden: Tensor, tokens: Int32Array | None) -> Tensor:
        """The logits of hidden states that belong to some tokens of the step; None: to all of them."""
        if self._adapters is not None:
            self._adapters.enter_head(tokens)
        return self._model.logits(hidden)

    def _empty_cache(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # -- captured steps -----------------------------------------------------------------------------------------------

    def _make_graphs(self, capture: Capture, settings: RunnerSettings) -> DecodeGraphs:
        padding: dict[str, np.generic] = {"input_ids": np.int32(0), "token_positions": np.int32(0)}
        if self._device_sampling is not None:
            padding |= self._device_sampling.padding
        max_num_samples = max(settings.max_num_seqs, settings.max_num_samples)
        return DecodeGraphs(
            self._prepare_captured,
            capture,
            padding=padding,
            max_num_tokens=min(max_num_samples, settings.max_num_batched_tokens),
            device=self._device,
        )

    @staticmethod
    def _captured_size(graphs: DecodeGraphs, step: StepInputs) -> int:
        """The size of the captured step that could stand for this one; 0: none can."""
        plan = step.plan
        if not step.sampling.after_every_token or plan.prompt_logprobs or step.batch.grid_positions is not None:
            return 0
        return graphs.size_for(plan.num_tokens) if max(plan.num_scheduled_tokens) <= MAX_NARROW_TOKENS else 0

    def _prepare_captured(self, key: GraphKey, tensors: Mapping[str, Tensor]) -> Callable[[], Tensor]:
        """A step of decoding over fixed inputs, down to samples or logits, planned without any sequence."""
        no_tables, nothing = np.zeros((0, 1), dtype=np.int32), np.zeros(0, dtype=np.int32)
        no_sequences = StepArrays(np.zeros(1, dtype=np.int32), nothing, no_tables, nothing)
        groups = [no_sequences] * self._rows.num_groups
        attention = self._plan_attention(groups, captured_tokens=key.size, variant=key.variant)
        device = self._device_sampling
        sampler = self._host_sampling if device is None or key.outcome is Outcome.LOGITS else device

        def run() -> Tensor:
            if self._adapters is not None:
                self._adapters.leave()
            input_ids = tensors["input_ids"] if device is None else device.fill_in(tensors["input_ids"])
            hidden = self._model(input_ids, StepContext(tensors["token_positions"], self._kv_cache.layers, attention))
            return sampler.compute(self._model.logits(hidden), tensors, key.outcome)

        return run
