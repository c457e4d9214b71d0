"""EngineCore: the scheduler and the runner, and the step that joins them. Token ids in, token ids out.

`load` builds one from a plan of the memory. The whole life of the engine is `step`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from quire.backends import BACKENDS
from quire.config import EngineConfig
from quire.engine import heap
from quire.engine.device import usable_cores
from quire.engine.fingerprint import fingerprint
from quire.engine.grammars import WaitingForGrammar, load_compiler
from quire.engine.limits import check_request
from quire.engine.load_ahead import LoadAhead, load_ahead
from quire.engine.memory_plan import MemoryPlan, max_num_samples
from quire.errors import DeviceMemoryError, RequestError
from quire.grammar.cache import GrammarCache
from quire.kernels import Kernels, cpu, kernels_for
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.storage import KVCache
from quire.kv_cache.tiers import Tier, TierIndex
from quire.model_config import ModelConfig
from quire.models.device_weights import DeviceWeights
from quire.models.packed_weights import PackedWeights
from quire.models.registry import Model, load_model
from quire.models.weights import RandomWeights, Weights
from quire.models.weights_cache import WeightsCache
from quire.outputs import EngineStats, MemoryReport, StepDeltas
from quire.request import Request
from quire.runner.block_store import BlockStore
from quire.runner.cuda_graphs import CudaCapture
from quire.runner.disk_blocks import DiskBlocks, file_bytes
from quire.runner.model_runner import ModelRunner, PendingStep
from quire.sampling.logits_processors import load_processors
from quire.sampling_params import SamplingParams
from quire.scheduler.draft_planner import DraftPlanner
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.policies import ADMISSIONS, SCHEDULING_POLICIES
from quire.scheduler.scheduler import Scheduler
from quire.step import StepPlan

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 4.0
"""Most time that `close` spends on saving blocks to the disk tier."""

_KV_TYPES = {"fp8_e4m3": torch.float8_e4m3fn}
"""Names of KV types that are not torch's."""

Phase = Callable[[str, float], None]
"""Called with the name of a phase of start-up that has ended and its seconds."""


class EngineCore:
    """One model on one device."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        grammars: GrammarCache,
        weights_cache: WeightsCache | None,
        *,
        vocab_size: int,
        max_logprobs: int,
        overlaps: bool = False,
    ) -> None:
        """`grammars` is the one that the runner finds them in; `weights_cache` may still be writing."""
        self._scheduler = scheduler
        self._runner = runner
        self._grammar_cache = grammars
        self._grammars = WaitingForGrammar(grammars)
        self._refused: list[tuple[str, RequestError]] = []
        self._vocab_size = vocab_size
        self._max_logprobs = max_logprobs
        self._weights_cache = weights_cache
        self._closed = False
        self._overlaps = overlaps
        self._under_way: tuple[StepPlan, PendingStep] | None = None
        """The step that was planned ahead."""

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        model_config: ModelConfig,
        plan: MemoryPlan,
        folder: Path,
        on_phase: Phase,
        *,
        ahead: LoadAhead | None = None,
        logits_processors: Sequence[object] | None = None,
        warm_grammars: bool = False,
    ) -> "EngineCore":
        """Read the weights and allocate the KV cache. Raises `CheckpointError` for files that do not fit the config.

        `ahead` was made for these arguments before this module was imported. `logits_processors`, names and objects,
        stand in the place of the config's, which can only hold names. `warm_grammars` also reads the vocabulary for
        structured outputs, in a thread: that of a large one would hold up running requests for a second if it were read
        when the first grammar comes.
        """
        processors = load_processors(config.logits_processors if logits_processors is None else logits_processors)
        grammars = GrammarCache(
            lambda: load_compiler(config, model_config, folder), config.max_grammars, config.grammar_memory
        )
        if warm_grammars:
            grammars.warm()
        started = time.perf_counter()
        cores = usable_cores()
        num_threads = config.threads or cores
        if num_threads > cores:
            logger.warning(
                "threads is %d, but there are %d cores to use: they will wait for each other", num_threads, cores
            )
        torch.set_num_threads(num_threads)
        device = torch.device(plan.device)
        kernels = kernels_for(plan.attention_backend)
        chosen = plan.attention_backend
        if chosen == "cpu":
            chosen = cpu.isa()
            if (config.kv_cache_dtype, plan.kv_cache_dtype) == ("auto", "bfloat16") and chosen != "avx512bf16":
                logger.warning(
                    "the KV cache is bfloat16, as this CPU says that it multiplies pairs of bfloat16, but the %s "
                    "kernels run, which do not; kv_cache_dtype float16 takes as much memory and is more precise",
                    chosen,
                )
        on_phase(f"kernels ({chosen}, {num_threads} thread{'s' * (num_threads != 1)})", time.perf_counter() - started)
        ahead = ahead or load_ahead(config, model_config, plan, folder)
        ahead.finish()
        packed = None if ahead.memory is None else PackedWeights(ahead.memory, ahead.stored)
        model = _load_model(config, model_config, plan, folder, kernels if packed is None else packed.kernels, device)
        if plan.kv_cache_dtype == "fp8_e4m3":
            model.scale_kv()
        from_cache = packed is not None and packed.num_packed == 0
        on_phase("weights from the cache" if from_cache else "weights", time.perf_counter() - started)
        if ahead.cache is not None and packed is not None and not from_cache:
            ahead.cache.store(packed.parts)

        started = time.perf_counter()
        kv_cache = KVCache(
            num_layers=model_config.num_layers,
            shapes=kernels.kv_cache_shapes(
                plan.num_blocks,
                model_config.num_kv_heads,
                plan.block_size,
                model_config.head_dim,
                scaled=plan.kv_cache_dtype == "int8",
            ),
            block_size=plan.block_size,
            dtype=_KV_TYPES.get(plan.kv_cache_dtype) or getattr(torch, plan.kv_cache_dtype),
            device=device,
        )
        pool = BlockPool(plan.num_blocks, plan.block_size, enable_prefix_caching=config.enable_prefix_caching)
        tiers, block_store = _open_tiers(config, plan, kv_cache, folder)
        if device.type == "cuda":
            surplus = plan.surplus(torch.cuda.memory_allocated(device))
            if surplus:
                logger.warning("%s", surplus)
        on_phase("KV cache", time.perf_counter() - started)
        scheduler = Scheduler(
            pool,
            SchedulerLimits(
                max_num_seqs=plan.max_num_seqs,
                max_num_batched_tokens=plan.max_num_batched_tokens,
                max_model_len=plan.max_model_len,
                max_num_partial_prefills=config.max_num_partial_prefills,
                max_pinned_share=config.max_pinned_share,
            ),
            tiers=tiers,
            speculation=None if config.speculative_config is None else DraftPlanner(config.speculative_config),
            make_queue=SCHEDULING_POLICIES[config.scheduling_policy],
            make_rule=ADMISSIONS[config.admission],
        )
        runner = ModelRunner(
            model,
            kv_cache,
            model_config,
            kernels,
            backend=plan.attention_backend,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
            num_threads=num_threads,
            block_store=block_store,
            logprobs_memory=plan.logprobs,
            logits_processors=processors,
            grammars=grammars,
            fast_forward=config.fast_forward,
            batch_invariant=config.deterministic,
            draws_on_device=device.type == "cuda" or (plan.async_scheduling and device.type == "cpu"),
            capture=CudaCapture() if plan.graphs else None,
            max_num_samples=max_num_samples(config),
        )
        return cls(
            scheduler,
            runner,
            grammars,
            ahead.cache,
            vocab_size=model_config.vocab_size,
            max_logprobs=config.max_logprobs,
            overlaps=plan.async_scheduling,
        )

    def add(self, request: Request, *, wait: bool = False) -> None:
        """Queue a request. Raises `RequestError` for one that can never run.

        One with a grammar is queued when that is compiled. Whoever has nothing else to do can `wait` for it; otherwise
        what is wrong with it comes out of `take_refused`.
        """
        check_request(request, vocab_size=self._vocab_size, max_logprobs=self._max_logprobs)
        if request.params.structured_outputs is None:
            self._scheduler.add(request)
            return
        self._grammars.add(request)
        self._queue_compiled(block=False)
        while wait and request.request_id in self._grammars:
            self._queue_compiled(block=True)
        for place, (request_id, error) in enumerate(self._refused):
            if request_id == request.request_id:
                del self._refused[place]
                raise error

    def take_refused(self) -> list[tuple[str, RequestError]]:
        """Requests refused since the last call, after `add` had taken them."""
        refused, self._refused = self._refused, []
        return refused

    def abort(self, request_id: str) -> None:
        """Forget a request; its memory is free when this returns."""
        self._grammars.abort(request_id)
        self._scheduler.abort(request_id)

    def stop(self, request_id: str, index: int) -> None:
        """End one sample of a request."""
        self._scheduler.stop(request_id, index)

    def register_prefix(self, prefix_id: str, token_ids: Sequence[int], salts: Sequence[str]) -> None:
        """Begin to compute a prefix that stays. Raises `RequestError` for one that cannot be held."""
        request = Request(
            request_id=prefix_id,
            prompt_token_ids=list(token_ids),
            params=SamplingParams(temperature=0.0, max_tokens=1),
            max_tokens=1,
            priority=-(2**31),
            cache_salt=salts[0],
        )
        check_request(request, vocab_size=self._vocab_size, max_logprobs=self._max_logprobs)
        self._scheduler.register_prefix(request, salts)

    def holds_prefix(self, prefix_id: str) -> bool:
        """Whether a registered prefix is computed and stays."""
        return prefix_id in self._scheduler.prefixes

    def unregister_prefix(self, prefix_id: str) -> None:
        """Let a registered prefix go."""
        self._scheduler.prefixes.remove(prefix_id)

    def step(self) -> StepDeltas:
        """Schedule, execute, update: one step of every sequence that got a share of it.

        On a device the next step is planned and begun before the result of this one is waited for, where it can be.

        Where all that could run wait for blocks from disk, it waits for one to arrive, but for a moment only.

        What makes later steps faster is done between two of them, and where there is nothing else to do.
        """
        if len(self._grammars):
            self._queue_compiled(block=not self._scheduler.has_work)
        if self._under_way is None:
            plan = self._scheduler.schedule()
            if not plan.rows and plan.offload is None:
                self._runner.prepare(idle=True)
                return StepDeltas()
            pending = self._launch(plan)
            if pending is None:
                self._scheduler.roll_back(plan)
                return StepDeltas()
        else:
            (plan, pending), self._under_way = self._under_way, None
        ahead = next_pending = None
        if self._overlaps and not pending.ready:
            ahead = self._scheduler.schedule_ahead(plan)
            if ahead is not None:
                next_pending = self._launch(ahead)
        self._runner.prepare(idle=False)
        deltas = self._scheduler.update(plan, pending.result())
        if ahead is not None and next_pending is not None:
            self._under_way = ahead, next_pending
        elif ahead is not None:
            self._scheduler.roll_back(ahead)
        if self._grammars.num_held:
            self._grammars.keep_held(self._scheduler.request_ids)
        return deltas

    def _launch(self, plan: StepPlan) -> PendingStep | None:
        """Begin a step; None where the device has no memory for it. One that has none for a single token is broken."""
        try:
            return self._runner.launch(plan)
        except DeviceMemoryError as error:
            if plan.num_tokens <= 1:
                raise
            logger.warning("out of memory: %s; its requests wait, and the next steps are half as large", error)
            return None

    def _queue_compiled(self, *, block: bool) -> None:
        """Queue the requests whose grammar is compiled, and refuse those it fails."""
        for request, error in self._grammars.take(block=block):
            try:
                if error is not None:
                    raise error
                self._scheduler.add(request)
            except RequestError as refusal:
                self._grammars.abort(request.request_id)
                self._refused.append((request.request_id, refusal))

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or len(self._grammars) > 0 or len(self._refused) > 0

    @property
    def has_idle_work(self) -> bool:
        """Whether `step` would save blocks to the disk tier, or capture steps to come, even without requests."""
        return self._scheduler.has_idle_work or self._runner.has_idle_work

    def close(self) -> None:
        """End all requests and save to the disk tier what it lacks, for `FLUSH_SECONDS` at most. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        for request_id in self._scheduler.request_ids:
            self._scheduler.abort(request_id)
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._scheduler.has_idle_work and time.monotonic() < deadline:
            self.step()
            time.sleep(0.001)
        self._runner.close()
        if self._weights_cache is not None:
            self._weights_cache.close()
        heap.give_back()

    def memory_report(self) -> MemoryReport:
        report = self._scheduler.memory_report()
        report.stats = self.stats()
        return report

    def stats(self) -> EngineStats:
        stats = self._scheduler.stats()
        stats.num_grammars, stats.num_grammar_bytes = len(self._grammar_cache), self._grammar_cache.num_bytes
        return stats

    def reset_prefix_cache(self) -> None:
        """Make every stored prefix unfindable that is not registered."""
        self._scheduler.reset_prefix_cache()


def _load_model(
    config: EngineConfig,
    model_config: ModelConfig,
    plan: MemoryPlan,
    folder: Path,
    kernels: Kernels,
    device: torch.device,
) -> Model:
    float32_activations = BACKENDS[plan.attention_backend].float32_activations
    made_on = torch.device("cpu") if float32_activations else device
    source = RandomWeights(config.seed, device=made_on) if config.load_format == "dummy" else Weights.open(folder)
    weights = source if float32_activations else DeviceWeights(source, device, getattr(torch, plan.dtype))
    return load_model(model_config, weights, kernels, plan.quantization or plan.dtype, max_model_len=plan.max_model_len)


def _open_tiers(
    config: EngineConfig, plan: MemoryPlan, kv_cache: KVCache, folder: Path
) -> tuple[TierIndex | None, BlockStore | None]:
    """The tiers that the config asks for: the index for the scheduler, the contents for the runner."""
    block_bytes = kv_cache.block_bytes
    num_host_blocks = plan.swap_space // block_bytes
    files = None
    if config.disk_cache is not None:
        from quire.kernels.cpu import isa

        key = fingerprint(config, plan, folder, isa())
        files = DiskBlocks.open(config.disk_cache, key, block_bytes)
    if not num_host_blocks and files is None:
        return None, None
    host = Tier(num_host_blocks * block_bytes, block_bytes) if num_host_blocks else None
    disk = Tier(config.disk_cache_size, file_bytes(block_bytes), files.stored) if files is not None else None
    store = BlockStore(kv_cache, num_host_blocks=num_host_blocks, disk=files)
    return TierIndex(time.monotonic, host=host, disk=disk), store
