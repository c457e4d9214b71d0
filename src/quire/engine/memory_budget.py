"""MemoryBudget: what a model and its steps take of the memory beside the KV cache, part by part, in bytes."""

from dataclasses import dataclass, replace

from quire.backends import BACKENDS, EXPANSION_WORKSPACE, MAX_CAPTURED_TOKENS, Backend
from quire.config import EngineConfig
from quire.dtypes import DTYPE_BYTES, FLOAT32_BYTES
from quire.engine.adapter_memory import adapter_memory
from quire.engine.device import Device
from quire.engine.image_memory import NO_IMAGES, ImageMemory, plan_images
from quire.kv_cache.tiers import num_staged_blocks
from quire.kv_groups import KVLayout
from quire.model_config import ModelConfig
from quire.step import logprob_bytes

CONTEXT_BYTES = 640 * 2**20
"""Memory of a card that a CUDA context, its kernels and the workspaces of cuBLAS take before any allocation."""
GRAPH_BYTES = 256 * 2**20
"""Allowance for captured steps beside their activations: their launches, a workspace of cuBLAS."""
SAMPLING_BYTES_PER_LOGIT = 4 + 4 + 8
"""Sampling on a device: float32 logits, and a sorted copy with its token ids."""
TOP_TOKENS_BYTES_PER_LOGIT = 4
"""Sampling with kernels that list token ids instead of sorting: at most all of them."""
LOGPROB_POSITIONS = 64
"""Positions whose log-probabilities are computed at once by default: enough for full-speed products."""
MAX_LOGPROBS_MEMORY = 64 * 2**20
"""Most bytes for them by default, however large the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageChoice:
    """Options that decide sizes, none of them open any more."""

    backend: str
    """A row of BACKENDS."""
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    block_size: int
    """Tokens."""
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Bytes, beside the KV cache."""

    available: int
    """Bytes that the plan may use: the host's, or a share of a card's own memory."""
    own_memory: bool
    """The device has memory of its own; swap space and staging are then the host's."""
    layout: KVLayout
    block: int
    """One KV block."""
    weights: int
    activations: int
    logprobs: int
    """For log-probabilities of prompts and samples, which are computed piece by piece in it."""
    context: int = 0
    """Memory that a device takes before any allocation."""
    graphs: int = 0
    """Allowance for captured steps."""
    swap_space: int = 0
    """The host tier: whole blocks."""
    staging: int = 0
    """Blocks on their way to and from the disk tier."""
    states: int = 0
    """Recurrent states."""
    adapters: int = 0
    """All slots of adapters."""
    images: ImageMemory = NO_IMAGES

    @property
    def tiers(self) -> int:
        """Memory of the host for the tiers below the KV cache."""
        return self.swap_space + self.staging

    @property
    def left(self) -> int:
        """Memory left for KV blocks; negative if the other parts do not fit."""
        left = self.available - self.weights - self.activations - self.logprobs - self.context - self.graphs
        left -= self.states + self.adapters + self.images.num_bytes
        return left if self.own_memory else left - self.tiers


def make_budget(
    config: EngineConfig, model: ModelConfig, choice: StorageChoice, device: Device, available: int
) -> MemoryBudget:
    """The parts of a plan, whether they fit or not."""
    backend = BACKENDS[choice.backend]
    if not backend.keeps_mxfp4:
        model = replace(model, mxfp4_experts=False)
    if not backend.keeps_codes or config.load_format == "dummy":
        model = replace(model, kept=None)
    spec = model.spec
    layout = KVLayout.of(spec)
    block = layout.block_bytes(choice.block_size, choice.kv_cache_dtype)
    num_samples = max_num_samples(config)
    if backend.float32_activations:
        activations = spec.activation_bytes(choice.max_num_batched_tokens, num_samples)
        if model.latent is not None:
            activations += EXPANSION_WORKSPACE
    else:
        activations = _device_activations(backend, model, choice, num_samples)
    if model.num_ranks > 1:  # every rank gathers the logits of the whole vocabulary
        activations += 2 * num_samples * model.vocab_size * FLOAT32_BYTES
    on_cuda = device.type == "cuda"
    # A captured step would need the slots of states as fixed inputs, and all ranks would have to capture together.
    captures = (
        on_cuda and backend.captures and not config.enforce_eager and not spec.state_bytes and config.num_ranks == 1
    )
    return MemoryBudget(
        available=available,
        own_memory=device.total_memory is not None,
        layout=layout,
        block=block,
        weights=_weight_bytes(model, backend, choice),
        activations=activations,
        logprobs=_logprobs_memory(config, model),
        context=CONTEXT_BYTES if on_cuda else 0,
        graphs=_graph_bytes(model, choice.dtype, min(MAX_CAPTURED_TOKENS, num_samples)) if captures else 0,
        swap_space=(config.swap_space or 0) // block * block,
        images=plan_images(
            config,
            model,
            "float32" if backend.float32_activations else choice.dtype,
            choice.dtype,
            choice.max_num_batched_tokens,
        ),
        staging=2 * num_staged_blocks(block) * block if config.disk_cache is not None else 0,
        adapters=adapter_memory(
            config, spec, "float32" if backend.float32_activations else choice.dtype, choice.max_num_batched_tokens
        ),
    )


def _weight_bytes(model: ModelConfig, backend: Backend, choice: StorageChoice) -> int:
    """Memory of the weights: as the checkpoint stores them, where the backend multiplies blocks of few bits."""
    if model.block_bytes and backend.float32_activations and choice.quantization is None:
        return model.block_bytes
    return model.spec.weight_bytes(choice.dtype, choice.quantization)


def max_num_samples(config: EngineConfig) -> int:
    """Rows of logits of the largest step: one for every sequence, and one for each token of one longest draft."""
    drafted = config.speculative_config.num_speculative_tokens if config.speculative_config is not None else 0
    return config.max_num_seqs + drafted


def _device_activations(backend: Backend, model: ModelConfig, choice: StorageChoice, num_samples: int) -> int:
    """Peak of a step on a device, whose activations are in `dtype` and whose sampling sorts at worst."""
    size = DTYPE_BYTES[choice.dtype]
    tokens = model.spec.activation_bytes(choice.max_num_batched_tokens, 0) * size // FLOAT32_BYTES
    logits = num_samples * model.vocab_size * (size + SAMPLING_BYTES_PER_LOGIT)
    rope = model.context_length * model.head_dim * FLOAT32_BYTES
    # Keys and values, each as it is stored and as it is read.
    gathered = 2 * backend.gathered_slots * model.spec.largest_kv * size
    return tokens + logits + rope + gathered + backend.workspace * len(KVLayout.of(model.spec).groups)


def _graph_bytes(model: ModelConfig, dtype: str, num_tokens: int) -> int:
    """Memory of all captured steps. They share one memory for activations, logits and the token ids that sampling
    lists, and one for logits that the host asks for."""
    size = DTYPE_BYTES[dtype]
    activations = model.spec.activation_bytes(num_tokens, 0) * size // FLOAT32_BYTES
    return GRAPH_BYTES + activations + num_tokens * model.vocab_size * (2 * size + TOP_TOKENS_BYTES_PER_LOGIT)


def _logprobs_memory(config: EngineConfig, model: ModelConfig) -> int:
    """Bytes for log-probabilities: as asked, or for `LOGPROB_POSITIONS`, and for one position at least."""
    if config.logprobs_memory is not None:
        return config.logprobs_memory
    position = logprob_bytes(model.vocab_size, config.max_logprobs)
    return max(position, min(LOGPROB_POSITIONS * position, MAX_LOGPROBS_MEMORY))
