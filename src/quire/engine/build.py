"""Builds an EngineCore for a memory plan: reads the weights, allocates the KV cache, wires scheduler and runner.

The only file of the engine that imports torch. Everything before it runs while torch is still being imported.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from quire.backends import BACKENDS
from quire.config import EngineConfig
from quire.engine.adapters import WaitingForAdapter
from quire.engine.cache_events import CacheEvents
from quire.engine.core import EngineCore
from quire.engine.device import ThreadCount, usable_cores
from quire.engine.fingerprint import fingerprint
from quire.engine.grammars import load_compiler
from quire.engine.memory_budget import max_num_samples
from quire.engine.memory_plan import MemoryPlan
from quire.engine.preloader import Preloader, preload
from quire.errors import ConfigError
from quire.grammar.cache import GrammarCache
from quire.kernels import Kernels, KVLayer, kernels_for
from quire.kernels.interface import KVShape, Packing
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.states import StatePool
from quire.kv_cache.storage import KVCache, StateCache
from quire.kv_cache.tiers import Tier, TierIndex
from quire.kv_groups import KVLayout, window_alignment
from quire.layers.adapters import ModelAdapters
from quire.lora.slots import AdapterSlots
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.device_weights import DeviceWeights
from quire.models.packed_weights import PackedWeights
from quire.models.random_weights import RandomWeights
from quire.models.registry import Model, load_model
from quire.models.weights import TensorSource
from quire.runner.block_store import BlockStore
from quire.runner.cuda_graphs import CudaCapture
from quire.runner.disk_blocks import DiskBlocks, file_bytes
from quire.runner.model_runner import ModelRunner, RunnerSettings
from quire.sampling.logits_processors import load_processors
from quire.scheduler.draft_planner import DraftPlanner
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.policies import ADMISSIONS, SCHEDULING_POLICIES
from quire.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

_KV_TYPES = {"fp8_e4m3": torch.float8_e4m3fn}
"""KV types that have another name in torch."""

Phase = Callable[[str, float], None]
"""Called after each phase of start-up with its name and its seconds."""


@dataclass(frozen=True, slots=True)
class _Target:
    """What is being built: the options, the model, and the plan made for both."""

    config: EngineConfig
    model_config: ModelConfig
    plan: MemoryPlan
    folder: Path
    kernels: Kernels
    device: torch.device
    layout: KVLayout
    adapters: ModelAdapters | None
    """Collects the layers that adapters may change; None without adapters."""


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
) -> EngineCore:
    """Load a model. Raises `CheckpointError` for files that do not fit the config.

    `preloader` was started with the same arguments before torch was imported. `logits_processors`, names or objects,
    replace the config's. `warm_grammars` reads the vocabulary now, in a thread, so that no grammar waits for it.
    """
    processors = load_processors(config.logits_processors if logits_processors is None else logits_processors)
    grammars = GrammarCache(
        lambda: load_compiler(config, model_config, folder), config.max_grammars, config.grammar_memory
    )
    if warm_grammars:
        grammars.warm()
    started = time.perf_counter()
    num_threads = _set_threads(config)
    kernels = kernels_for(plan.attention_backend, encoder=model_config.is_encoder and not config.deterministic)
    device = torch.device(plan.device)
    adapters = ModelAdapters(config.max_loras, config.max_lora_rank) if config.enable_lora else None
    target = _Target(config, model_config, plan, folder, kernels, device, KVLayout.of(model_config.spec), adapters)
    name = _kernel_name(config, plan, target.kernels)
    on_phase(f"kernels ({name}, {num_threads} thread{'s' * (num_threads != 1)})", time.perf_counter() - started)
    preloader = preloader or preload(config, model_config, plan, folder)
    model, from_cache = _load_weights(target, preloader)
    on_phase("weights from the cache" if from_cache else "weights", time.perf_counter() - started)
    started = time.perf_counter()
    kv_cache = _make_kv_cache(target)
    tiers, block_store = _open_tiers(target, kv_cache)
    _warn_of_surplus(target)
    on_phase("KV cache", time.perf_counter() - started)
    runner = ModelRunner(
        model,
        kv_cache,
        model_config,
        target.kernels,
        _runner_settings(config, plan, num_threads),
        logits_processors=processors,
        block_store=block_store,
        grammars=grammars,
        capture=CudaCapture() if plan.graphs else None,
    )
    scheduler, events = _make_scheduler(target, tiers)
    core = EngineCore(
        scheduler,
        runner,
        grammars,
        preloader.cache,
        vocab_size=model_config.vocab_size,
        max_logprobs=config.max_logprobs,
        overlaps=plan.async_scheduling,
        events=events,
    )
    if target.adapters is not None:
        slots = _make_slots(target, target.adapters)
        runner.use_adapters(slots)
        core.use_adapters(WaitingForAdapter(slots))
    return core


def _runner_settings(config: EngineConfig, plan: MemoryPlan, num_threads: int) -> RunnerSettings:
    return RunnerSettings(
        backend=plan.attention_backend,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        num_threads=num_threads,
        count_threads=None if config.threads else ThreadCount(),
        logprobs_memory=plan.logprobs,
        fast_forward=config.fast_forward,
        batch_invariant=config.deterministic,
        sample_on_device=plan.device == "cuda" or (plan.async_scheduling and plan.device == "cpu"),
        max_num_samples=max_num_samples(config),
    )


def _set_threads(config: EngineConfig) -> int:
    """Give torch as many threads as the config says, or one per usable core; returns the number."""
    cores = usable_cores()
    num_threads = config.threads or cores
    if num_threads > cores:
        logger.warning(
            "threads is %d, but there are %d cores to use: they will wait for each other", num_threads, cores
        )
    torch.set_num_threads(num_threads)
    return num_threads


def _kernel_name(config: EngineConfig, plan: MemoryPlan, kernels: Kernels) -> str:
    """The backend, or on a CPU its instruction set. Warns if the KV type was chosen for another instruction set."""
    name = kernels.describe()
    if plan.attention_backend != "cpu":
        return name
    if (config.kv_cache_dtype, plan.kv_cache_dtype) == ("auto", "bfloat16") and name != "avx512bf16":
        logger.warning(
            "the KV cache is bfloat16, because this CPU reports that it multiplies pairs of bfloat16, but the %s "
            "kernels run, which do not; kv_cache_dtype float16 takes as much memory and is more precise",
            name,
        )
    return name


def _load_weights(target: _Target, preloader: Preloader) -> tuple[Model, bool]:
    """The model, and whether its weights came packed from the cache; else they are now being stored there."""
    preloader.finish()
    source = _open(target)
    packed = None
    if preloader.memory is not None:
        packed = PackedWeights(preloader.memory, preloader.stored, source.release)
    model = _load_model(target, source, packed)
    if target.plan.kv_cache_dtype == "fp8_e4m3":
        model.scale_kv()
    # Blocks of a GGUF file are not packed at all.
    from_cache = packed is not None and packed.num_packed == 0 and bool(packed.parts)
    if preloader.cache is not None and packed is not None and packed.num_packed:
        preloader.cache.store(packed.parts)
    return model, from_cache


def _load_model(target: _Target, source: TensorSource, packing: Packing | None) -> Model:
    plan = target.plan
    stored_as = plan.quantization or plan.dtype
    return load_model(
        target.model_config,
        source,
        target.kernels,
        stored_as,
        packing=packing,
        adapters=target.adapters,
        max_model_len=plan.max_model_len,
    )


def _open(target: _Target) -> TensorSource:
    config, plan = target.config, target.plan
    float32_activations = BACKENDS[plan.attention_backend].float32_activations
    source: TensorSource
    if config.load_format == "dummy":
        source = RandomWeights(config.seed, device=torch.device("cpu") if float32_activations else target.device)
    else:
        source = open_checkpoint(target.folder, target.model_config.stored)
    return source if float32_activations else DeviceWeights(source, target.device, getattr(torch, plan.dtype))


def _make_slots(target: _Target, adapters: ModelAdapters) -> AdapterSlots:
    """Slots for adapters. Raises `ConfigError` for a model that they cannot change."""
    if not adapters.linears:
        raise ConfigError(
            f"enable_lora is set, but {target.model_config.architecture} is computed by transformers, whose layers "
            "Quire's adapters cannot change; leave it out, or merge the adapter into the checkpoint"
        )
    float32 = BACKENDS[target.plan.attention_backend].float32_activations
    dtype = torch.float32 if float32 else getattr(torch, target.plan.dtype)
    return AdapterSlots(adapters, target.kernels, dtype=dtype, device=target.device, memory=target.plan.adapters)


def _make_kv_cache(target: _Target) -> KVCache:
    plan, row, kernels = target.plan, target.layout.row, target.kernels
    recurrent = target.model_config.spec.recurrent_layers
    shapes: Sequence[KVShape] = kernels.kv_cache_shapes(
        plan.num_blocks, row.num_heads, plan.block_size, row.key_dim, scaled=plan.kv_cache_dtype == "int8"
    )
    is_latent = row.kind == "latent"
    return KVCache(
        groups=target.layout.groups,
        shapes=shapes[:1] if is_latent else shapes,
        make_layer=partial(kernels.latent_layer, value_dim=row.value_dim) if is_latent else KVLayer,
        block_size=plan.block_size,
        dtype=_KV_TYPES.get(plan.kv_cache_dtype) or getattr(torch, plan.kv_cache_dtype),
        device=target.device,
        states=StateCache(recurrent, plan.num_state_slots, target.device) if recurrent else None,
    )


def _open_tiers(target: _Target, kv_cache: KVCache) -> tuple[TierIndex | None, BlockStore | None]:
    """The tiers that the config asks for: the index for the scheduler, the contents for the runner."""
    config, plan = target.config, target.plan
    block_bytes, state_bytes = kv_cache.block_bytes, 0 if kv_cache.states is None else kv_cache.states.slot_bytes
    num_host_blocks = plan.swap_space // block_bytes
    files = None
    if config.disk_cache is not None:
        rope = target.model_config.rope
        long_rope = rope is not None and rope.is_long(plan.max_model_len)
        key = fingerprint(config, plan, target.folder, target.kernels.describe(), long_rope=long_rope)
        files = DiskBlocks.open(config.disk_cache, key, block_bytes, *([state_bytes] if state_bytes else []))
    if not num_host_blocks and files is None:
        return None, None
    host = disk = None
    if num_host_blocks:
        in_blocks = -(-state_bytes // block_bytes) * block_bytes
        host = Tier(num_host_blocks * block_bytes, block_bytes, state_bytes=in_blocks)
    if files is not None:
        on_disk = file_bytes(state_bytes)
        disk = Tier(config.disk_cache_size, file_bytes(block_bytes), files.stored, state_bytes=on_disk)
    store = BlockStore(kv_cache, num_host_blocks=num_host_blocks, disk=files)
    return TierIndex(time.monotonic, host=host, disk=disk), store


def _warn_of_surplus(target: _Target) -> None:
    """Warn if a CUDA device holds more memory than the plan counted."""
    if target.device.type == "cuda":
        surplus = target.plan.surplus(torch.cuda.memory_allocated(target.device))
        if surplus:
            logger.warning("%s", surplus)


def _make_scheduler(target: _Target, tiers: TierIndex | None) -> tuple[Scheduler, CacheEvents | None]:
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
            max_kept_image_tokens=plan.images.kept_tokens,
            max_step_image_tokens=plan.images.step_tokens,
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
