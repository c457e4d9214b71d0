"""Builds an EngineCore for a memory plan: reads the weights, allocates the KV cache, wires scheduler and runner.

With `build_rank` the only file of the engine that loads torch. Everything before it runs while torch is still being
imported.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from quire.config import EngineConfig
from quire.engine.adapters import WaitingForAdapter
from quire.engine.build_rank import (
    Phase,
    Target,
    kernel_name,
    load_weights,
    make_kv_cache,
    make_slots,
    make_target,
    open_tiers,
    runner_settings,
    set_threads,
    warn_of_surplus,
)
from quire.engine.cache_events import CacheEvents
from quire.engine.core import EngineCore
from quire.engine.executor import Executor
from quire.engine.grammars import load_compiler
from quire.engine.memory_plan import MemoryPlan
from quire.engine.preloader import Preloader, preload
from quire.grammar.cache import GrammarCache
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.states import StatePool
from quire.kv_cache.tiers import TierIndex
from quire.kv_groups import window_alignment
from quire.model_config import ModelConfig
from quire.runner.cuda_graphs import CudaCapture
from quire.runner.model_runner import ModelRunner
from quire.sampling.logits_processors import load_processors
from quire.scheduler.draft_planner import DraftPlanner
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.policies import ADMISSIONS, SCHEDULING_POLICIES
from quire.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


RANK_PROGRAM = "quire.engine.rank_process"
"""The module that the other ranks run."""


class OtherRanks(Protocol):
    """A `RankGroup` as this file sees it. Only ranks need msgspec, so one process runs on machines without it."""

    meeting_file: Path

    def wait_loaded(self) -> None: ...
    def executor(self, runner: ModelRunner) -> Executor: ...
    def close(self) -> None: ...


def build_core(
    config: EngineConfig,
    model_config: ModelConfig,
    plan: MemoryPlan,
    folder: Path,
    on_phase: Phase,
    *,
    preloader: Preloader | None = None,
    logits_processors: Sequence[object] | None = None,
    warm_grammars: bool = False,
    on_rank_death: Callable[[str], None] | None = None,
) -> EngineCore:
    """Load a model. Raises `CheckpointError` for files that do not fit the config.

    `preloader` was started with the same arguments before torch was imported. `logits_processors`, names or objects,
    replace the config's. `warm_grammars` reads the vocabulary now, in a thread, so that no grammar waits for it.
    `on_rank_death` is called in a thread if another rank dies; a step then raises `RankDeadError`.
    """
    group = None
    if config.num_ranks > 1:
        group = _start_ranks(config, plan, folder, on_rank_death)
    try:
        return _build_core(
            config,
            model_config,
            plan,
            folder,
            on_phase,
            preloader=preloader,
            logits_processors=logits_processors,
            warm_grammars=warm_grammars,
            group=group,
        )
    except BaseException:
        if group is not None:
            group.close()
        raise


def _build_core(
    config: EngineConfig,
    model_config: ModelConfig,
    plan: MemoryPlan,
    folder: Path,
    on_phase: Phase,
    *,
    preloader: Preloader | None,
    logits_processors: Sequence[object] | None,
    warm_grammars: bool,
    group: OtherRanks | None,
) -> EngineCore:
    processors = load_processors(config.logits_processors if logits_processors is None else logits_processors)
    grammars = GrammarCache(
        lambda: load_compiler(config, model_config, folder), config.max_grammars, config.grammar_memory
    )
    if warm_grammars:
        grammars.warm()
    started = time.perf_counter()
    num_threads = set_threads(config)
    target = make_target(config, model_config, plan, folder)
    name = kernel_name(config, plan, target.kernels)
    on_phase(f"kernels ({name}, {num_threads} thread{'s' * (num_threads != 1)})", time.perf_counter() - started)
    preloader = preloader or preload(config, model_config, plan, folder)
    model, from_cache = load_weights(target, preloader, on_phase)
    on_phase("weights from the cache" if from_cache else "weights", time.perf_counter() - started)
    started = time.perf_counter()
    kv_cache = make_kv_cache(target)
    tiers, block_store = open_tiers(target, kv_cache)
    warn_of_surplus(target)
    on_phase("KV cache", time.perf_counter() - started)
    runner = ModelRunner(
        model,
        kv_cache,
        target.model_config,
        target.kernels,
        runner_settings(config, plan, num_threads),
        logits_processors=processors,
        block_store=block_store,
        grammars=grammars,
        capture=CudaCapture() if plan.graphs else None,
    )
    executor: Executor = runner
    if group is not None:
        started = time.perf_counter()
        group.wait_loaded()
        target.connect(group.meeting_file)
        executor = group.executor(runner)
        on_phase(f"{config.num_ranks} ranks", time.perf_counter() - started)
    scheduler, events = _make_scheduler(target, tiers)
    core = EngineCore(
        scheduler,
        executor,
        grammars,
        preloader.cache,
        vocab_size=model_config.vocab_size,
        max_logprobs=config.max_logprobs,
        overlaps=plan.async_scheduling,
        events=events,
    )
    if target.adapters is not None:
        slots = make_slots(target, target.adapters)
        runner.use_adapters(slots)
        core.use_adapters(WaitingForAdapter(slots))
    return core


def _start_ranks(
    config: EngineConfig, plan: MemoryPlan, folder: Path, on_death: Callable[[str], None] | None
) -> OtherRanks:
    """Start the processes of the other ranks; they load their parts while this one does."""
    import msgspec

    from quire.engine.messages import RankLoad
    from quire.parallel.rank_group import RankGroup

    def orders(rank: int, meeting_file: Path) -> bytes:
        return msgspec.msgpack.encode(RankLoad(config, plan, str(folder), rank, str(meeting_file)))

    return RankGroup(RANK_PROGRAM, config.num_ranks, orders, on_death)


def _make_scheduler(target: Target, tiers: TierIndex | None) -> tuple[Scheduler, CacheEvents | None]:
    """The scheduler, and what publishes the content of its pool, if the config asks for that."""
    config, plan = target.config, target.plan
    pool = BlockPool(
        plan.num_blocks,
        plan.block_size,
        windows=target.layout.windows,
        window_alignment=window_alignment(plan.block_size, batch_invariant=config.deterministic),
        enable_prefix_caching=config.enable_prefix_caching and not target.model_config.needs_whole_texts,
    )
    states = None
    if plan.num_state_slots:
        states = StatePool(plan.num_state_slots, plan.max_num_seqs, slot_bytes=plan.state_bytes)
    speculation = None if config.speculative_config is None else DraftPlanner(config.speculative_config)
    scheduler = Scheduler(
        pool,
        SchedulerLimits(
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
            max_num_partial_prefills=config.max_num_partial_prefills,
            whole_prompts=target.model_config.needs_whole_texts,
            max_pinned_share=config.max_pinned_share,
            background_delay=config.background_delay,
            max_kept_image_tokens=plan.images.kept_tokens,
            max_step_image_tokens=plan.images.step_tokens,
            whole_images=target.model_config.tokens_of_whole_images > 0,
        ),
        tiers=tiers,
        speculation=speculation,
        states=states,
        make_queue=SCHEDULING_POLICIES[config.scheduling_policy],
        make_rule=ADMISSIONS[config.admission],
    )
    published = config.kv_events_config
    events = CacheEvents(published, pool, tiers) if published is not None and published.is_on else None
    return scheduler, events
