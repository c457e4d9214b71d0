"""EngineCore: the scheduler and the runner, and the step that joins them. Token ids in, token ids out.

`load` builds one from a plan of the memory. The whole life of the engine is `step`.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from quire.config import EngineConfig
from quire.engine.limits import check_request
from quire.engine.memory_plan import MemoryPlan
from quire.kernels import kernels_for
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.storage import KVCache
from quire.model_config import ModelConfig
from quire.models.registry import load_model
from quire.models.weights import RandomWeights, Weights
from quire.outputs import EngineStats, SequenceDelta
from quire.request import Request
from quire.runner.model_runner import ModelRunner
from quire.sampling.logits_processors import BatchLogitsProcessor, load_processors
from quire.sampling_params import SamplingParams
from quire.scheduler.scheduler import Scheduler

Phase = Callable[[str, float], None]
"""Called with the name of a phase of start-up that has ended and its seconds."""


class EngineCore:
    """One model on one device."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, *, vocab_size: int, max_logprobs: int) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._vocab_size = vocab_size
        self._max_logprobs = max_logprobs

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        model_config: ModelConfig,
        plan: MemoryPlan,
        folder: Path,
        on_phase: Phase,
        *,
        logits_processors: Sequence[str | BatchLogitsProcessor] | None = None,
    ) -> "EngineCore":
        """Read the weights and allocate the KV cache. Raises `CheckpointError` for files that do not fit the config.

        `logits_processors` stand in the place of the config's, which can only hold names.
        """
        processors = load_processors(config.logits_processors if logits_processors is None else logits_processors)
        started = time.perf_counter()
        num_threads = config.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(num_threads)
        kernels = kernels_for("cpu")
        weights = RandomWeights(config.seed) if config.load_format == "dummy" else Weights.open(folder)
        model = load_model(model_config, weights, kernels, plan.dtype, max_model_len=plan.max_model_len)
        on_phase("weights", time.perf_counter() - started)

        started = time.perf_counter()
        kv_cache = KVCache(
            num_layers=model_config.num_layers,
            num_blocks=plan.num_blocks,
            num_kv_heads=model_config.num_kv_heads,
            block_size=plan.block_size,
            head_dim=model_config.head_dim,
            dtype=getattr(torch, plan.kv_cache_dtype),
        )
        pool = BlockPool(plan.num_blocks, plan.block_size, enable_prefix_caching=config.enable_prefix_caching)
        on_phase("KV cache", time.perf_counter() - started)
        scheduler = Scheduler(
            pool,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
            max_num_partial_prefills=config.max_num_partial_prefills,
            max_pinned_share=config.max_pinned_share,
        )
        runner = ModelRunner(
            model,
            kv_cache,
            model_config,
            kernels,
            max_num_seqs=plan.max_num_seqs,
            max_model_len=plan.max_model_len,
            num_threads=num_threads,
            logprobs_memory=plan.logprobs,
            logits_processors=processors,
        )
        return cls(scheduler, runner, vocab_size=model_config.vocab_size, max_logprobs=config.max_logprobs)

    def add(self, request: Request) -> None:
        """Queue a request. Raises `RequestError` for one that can never run."""
        check_request(request, vocab_size=self._vocab_size, max_logprobs=self._max_logprobs)
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Forget a request; its memory is free when this returns."""
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

    def step(self) -> list[SequenceDelta]:
        """Schedule, execute, update: one step of every sequence that got a share of it."""
        plan = self._scheduler.schedule()
        if not plan.rows:
            return []
        result = self._runner.execute(plan)
        return self._scheduler.update(plan, result)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def reset_prefix_cache(self) -> None:
        """Make every stored prefix unfindable that is not registered."""
        self._scheduler.pool.forget_names()
