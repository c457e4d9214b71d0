"""Builds what one rank runs: the kernels, its part of the weights, the KV cache, the tiers, the runner's settings.

`build` puts the scheduler above it. Without ranks, the one process has all of the model.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from quire.backends import BACKENDS
from quire.config import EngineConfig
from quire.engine.device import ThreadCount, numa_nodes, usable_cores
from quire.engine.fingerprint import fingerprint
from quire.engine.memory_budget import max_num_samples
from quire.engine.memory_plan import MemoryPlan
from quire.engine.preloader import Preloader, preload
from quire.engine.rank_parts import part_of
from quire.errors import ConfigError
from quire.kernels import Kernels, KVLayer, kernels_for
from quire.kernels.interface import KVShape, Packing
from quire.kv_cache.storage import KVCache, StateCache
from quire.kv_cache.tiers import Tier, TierIndex
from quire.kv_groups import KVLayout
from quire.kv_transfer_config import KVTransferConfig
from quire.layers.adapters import ModelAdapters
from quire.layers.pipe import Pipe
from quire.layers.ranks import Ranks
from quire.lora.slots import AdapterSlots
from quire.model_config import ModelConfig
from quire.model_config.divided import kv_copies
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.device_weights import DeviceWeights
from quire.models.more_bits import MoreBits
from quire.models.packed_weights import PackedWeights
from quire.models.random_weights import RandomWeights
from quire.models.registry import Model, load_model
from quire.models.shards import Shards
from quire.models.weights import TensorSource
from quire.runner.block_store import BlockStore
from quire.runner.disk_blocks import DiskBlocks, file_bytes
from quire.runner.model_runner import ModelRunner, RunnerSettings

logger = logging.getLogger(__name__)

Phase = Callable[[str, float], None]
"""Called after each phase of start-up with its name and its seconds."""


def _unreported(phase: str, seconds: float) -> None:
    """A follower reports no phases."""


_KV_TYPES = {"fp8_e4m3": torch.float8_e4m3fn}
"""KV types that have another name in torch."""


@dataclass(frozen=True, slots=True)
class Target:
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
    shards: Shards | None
    """Which part of each layer this rank has; None for all of it."""
    pipe: Pipe | None
    """Joins this rank's layers with those of others; None where it has all layers."""

    def connect(self, meeting_file: Path) -> None:
        """Meet the ranks of the same stage, and those that hold the same part of the other stages."""
        stage = 0 if self.pipe is None else self.pipe.stage.index
        place = 0 if self.shards is None else self.shards.ranks.rank
        if self.shards is not None:
            self.shards.ranks.connect(meeting_file.with_name(f"stage-{stage}"), self.device)
        if self.pipe is not None:
            self.pipe.connect(meeting_file.with_name(f"line-{place}"), self.device)


def make_target(
    config: EngineConfig, model_config: ModelConfig, plan: MemoryPlan, folder: Path, rank: int = 0
) -> Target:
    size = config.tensor_parallel_size
    part = part_of(config, model_config, rank)
    shards = pipe = None
    if size > 1:
        shards = Shards(Ranks(rank % size, size), kv_copies(model_config, size), model_config.vocab_size)
    if part.stage is not None:
        float32 = BACKENDS[plan.attention_backend].float32_activations
        pipe = Pipe(part.stage, part.hidden_size, torch.float32 if float32 else getattr(torch, plan.dtype))
    is_one_card_of_many = plan.device == "cuda" and config.num_ranks > 1
    device = torch.device(plan.device, rank) if is_one_card_of_many else torch.device(plan.device)
    return Target(
        config,
        part,
        plan,
        folder,
        kernels_for(plan.attention_backend),
        device,
        KVLayout.of(part.spec),
        ModelAdapters(config.max_loras, config.max_lora_rank) if config.enable_lora else None,
        shards,
        pipe,
    )


def build_follower(
    config: EngineConfig, model_config: ModelConfig, plan: MemoryPlan, folder: Path, rank: int
) -> tuple[ModelRunner, Callable[[Path], None]]:
    """Load the part of a rank other than 0. Returns its runner, which does not sample, and what makes it meet the other
    ranks at a file."""
    num_threads = set_threads(config)
    target = make_target(config, model_config, plan, folder, rank)
    model, _ = load_weights(target, preload(config, model_config, plan, folder))
    kv_cache = make_kv_cache(target)
    _, block_store = open_tiers(target, kv_cache)
    stage = target.model_config.stage
    settings = replace(
        runner_settings(config, plan, num_threads),
        samples=False,
        sample_on_device=False,
        reads_hidden=stage is None or stage.is_last,
    )
    runner = ModelRunner(model, kv_cache, target.model_config, target.kernels, settings, block_store=block_store)
    return runner, target.connect


def runner_settings(config: EngineConfig, plan: MemoryPlan, num_threads: int) -> RunnerSettings:
    return RunnerSettings(
        backend=plan.attention_backend,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        num_threads=num_threads,
        count_threads=None if config.threads or config.num_ranks > 1 else ThreadCount(),
        logprobs_memory=plan.logprobs,
        fast_forward=config.fast_forward,
        batch_invariant=config.deterministic,
        sample_on_device=plan.device == "cuda" or (plan.async_scheduling and plan.device == "cpu"),
        max_num_samples=max_num_samples(config),
    )


def set_threads(config: EngineConfig) -> int:
    """Give torch as many threads as the config says, or one per usable core, which ranks on a CPU divide among
    themselves; returns the number. Stages compute one after the other, so each has all of them."""
    cores = usable_cores()
    if config.tensor_parallel_size > 1 and len(numa_nodes()) != config.num_ranks:
        cores = max(1, cores // config.tensor_parallel_size)
    num_threads = config.threads or cores
    if num_threads > cores:
        logger.warning(
            "threads is %d, but there are %d cores to use: they will wait for each other", num_threads, cores
        )
    torch.set_num_threads(num_threads)
    return num_threads


def kernel_name(config: EngineConfig, plan: MemoryPlan, kernels: Kernels) -> str:
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


def load_weights(target: Target, preloader: Preloader, on_phase: Phase = _unreported) -> tuple[Model, bool]:
    """The model, and whether its weights came packed from the cache; else they are now being stored there."""
    preloader.finish()
    source = _open(target)
    packed = None
    if preloader.memory is not None:
        packed = PackedWeights(preloader.memory, preloader.stored, source.release)
    model = _load_model(target, source, packed, on_phase)
    if target.plan.kv_cache_dtype == "fp8_e4m3":
        model.scale_kv()
    # Blocks of a GGUF file are copied at every start.
    from_cache = packed is not None and packed.num_packed == 0 and bool(packed.parts)
    if preloader.cache is not None and packed is not None and packed.num_packed:
        preloader.cache.store(packed.parts)
    return model, from_cache


def _load_model(target: Target, source: TensorSource, packing: Packing | None, on_phase: Phase) -> Model:
    plan, started = target.plan, time.perf_counter()
    stored_as = plan.quantization or plan.dtype
    if plan.quantization is not None and target.model_config.packed_as is None:
        more = MoreBits.choose(target.model_config, _open(target), plan.quantization, target.shards)
        if more.num_measured:
            on_phase(more.describe(), time.perf_counter() - started)
        packing = more.around(packing or target.kernels)
    return load_model(
        target.model_config,
        source,
        target.kernels,
        stored_as,
        packing=packing,
        adapters=target.adapters,
        shards=target.shards,
        pipe=target.pipe,
        max_model_len=plan.max_model_len,
    )


def _open(target: Target) -> TensorSource:
    config, plan = target.config, target.plan
    float32_activations = BACKENDS[plan.attention_backend].float32_activations
    source: TensorSource
    if config.load_format == "dummy":
        source = RandomWeights(config.seed, device=torch.device("cpu") if float32_activations else target.device)
    else:
        source = open_checkpoint(target.folder, target.model_config.stored)
    return source if float32_activations else DeviceWeights(source, target.device, getattr(torch, plan.dtype))


def make_slots(target: Target, adapters: ModelAdapters) -> AdapterSlots:
    """Slots for adapters. Raises `ConfigError` for a model that they cannot change."""
    if not adapters.linears:
        raise ConfigError(
            f"enable_lora is set, but {target.model_config.architecture} is computed by transformers, whose layers "
            "Quire's adapters cannot change; leave it out, or merge the adapter into the checkpoint"
        )
    float32 = BACKENDS[target.plan.attention_backend].float32_activations
    dtype = torch.float32 if float32 else getattr(torch, target.plan.dtype)
    return AdapterSlots(adapters, target.kernels, dtype=dtype, device=target.device, memory=target.plan.adapters)


def make_kv_cache(target: Target) -> KVCache:
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


def open_tiers(target: Target, kv_cache: KVCache) -> tuple[TierIndex | None, BlockStore | None]:
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
    transfer = config.kv_transfer_config
    if transfer is not None and files is not None:
        _join_engines(transfer, files)
    if not num_host_blocks and files is None:
        return None, None
    host = disk = None
    if num_host_blocks:
        in_blocks = -(-state_bytes // block_bytes) * block_bytes
        host = Tier(num_host_blocks * block_bytes, block_bytes, state_bytes=in_blocks)
    if files is not None:
        on_disk = file_bytes(state_bytes)
        size = config.disk_cache_size
        disk = Tier(
            size,
            file_bytes(block_bytes),
            files.stored,
            state_bytes=on_disk,
            changes=files.take_changes,
            eager=transfer is not None and transfer.gives,
            fetches=transfer is not None and transfer.fetches,
        )
    store = BlockStore(kv_cache, num_host_blocks=num_host_blocks, disk=files)
    return TierIndex(time.monotonic, host=host, disk=disk), store


def _join_engines(transfer: KVTransferConfig, files: DiskBlocks) -> None:
    """Give blocks to other engines, and fetch theirs. Raises `ConfigError` for a key or address that cannot be used."""
    key = transfer.read_key()
    if transfer.gives:
        files.give((transfer.kv_ip, transfer.kv_port), key)
    if transfer.fetches:
        files.fetch_from(transfer.kv_peers, key)


def warn_of_surplus(target: Target) -> None:
    """Warn if a CUDA device holds more memory than the plan counted."""
    if target.device.type == "cuda":
        surplus = target.plan.surplus(torch.cuda.memory_allocated(target.device))
        if surplus:
            logger.warning("%s", surplus)
