"""SimulationSettings: every option of one simulation, and the flags of `quire simulate`."""

from dataclasses import dataclass

from quire import config
from quire.errors import ConfigError
from quire.option_values import parse_size

POLICIES = ("paged", "orca-max", "orca-pow2", "orca-oracle", "fastertransformer")
SCHEDULING_POLICIES = (*config.SCHEDULING_POLICIES, "oracle-shortest")
ADMISSIONS = (*config.ADMISSIONS, "new-token-ratio")
ARRIVALS = ("auto", "trace", "poisson", "gamma", "bursts")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """Options of one simulation. Raises `ConfigError` for a value out of range or options that contradict each other.

    "(paged)" marks options of policy paged.
    """

    trace: str = ""
    """sharegpt, sharegpt-turns, alpaca, mooncake, azure-conv or azure-code, which come with the package; or a file of
    request lengths (CSV, JSONL, also as .gz or .xz), or its name in the traces folder."""
    traces_dir: str = "."
    """Folder in which a trace is looked up by name."""
    model: str = "OPT-13B"
    """The model: a published name such as OPT-13B, or the path of a config.json or its folder."""
    device: str = "A100-40GB"
    """The device: a known name such as H100, or a JSON file of measured coefficients."""
    num_devices: int | None = None
    """Devices that share the model (tensor parallel). None takes the smallest power of two that holds the weights."""
    policy: str = "paged"
    """paged is this engine; orca-max, orca-pow2, orca-oracle and fastertransformer are the paper's baselines. Give
    several as paged,orca-max."""
    scheduling_policy: str = "fcfs"
    """Order of admission: fcfs, shortest, fair, as in quire serve; oracle-shortest knows all lengths (paged)."""
    admission: str = "current"
    """Rule of admission: current or predicted, as in quire serve; new-token-ratio is SGLang's rule (paged)."""
    max_tokens: int | None = None
    """Token limit of requests that have none in the trace. None: their output length, which is then known."""
    rate: float | None = None
    """Requests per second; the trace's own arrivals are stretched to this rate. None takes them as they are."""
    arrivals: str = "auto"
    """How requests arrive: trace, poisson, gamma or bursts; auto takes the trace's arrivals, or else poisson."""
    cv: float = 2.0
    """Coefficient of variation of gamma arrivals; 1 is the same as poisson."""
    burst_size: int = 16
    """Requests of one burst."""
    num_requests: int | None = None
    """Requests to simulate; a shorter trace starts again. None takes every row once."""
    duration: float | None = None
    """Seconds of arrivals; a trace without arrivals starts again as often as needed."""
    saturate: bool = False
    """Keep the queue always full instead of letting requests arrive; latencies then count from admission."""
    warm_up: int = 0
    """Requests that end before measuring begins, so that the simultaneous start does not count."""
    seed: int = 0
    """Seed of arrivals and faults; the same seed gives the same result, byte for byte."""
    kv_cache_memory: int | None = None
    """Bytes for KV on all devices together, e.g. 12GiB; None takes what the weights leave of 90 % of the memory."""
    kv_slots: int | None = None
    """Tokens that the KV memory holds; an alternative to kv_cache_memory."""
    block_size: int = 16
    """Tokens per KV block (paged)."""
    max_num_seqs: int = 256
    """Most sequences that run at once (paged)."""
    max_num_batched_tokens: int = 2048
    """Most tokens computed in one step (paged)."""
    max_model_len: int | None = None
    """Most tokens of prompt + output, which orca-max reserves for every request; None takes the model's context."""
    enable_prefix_caching: bool = True
    """Reuse the KV of blocks that an earlier request computed (paged)."""
    n: int = 1
    """Samples per request; the baselines store the prompt once for each sample."""
    beam_width: int | None = None
    """Beams per request: beam search instead of sampling. The baselines store the prompt once for each beam."""
    shared_prefix: int = 0
    """Tokens of a prefix put before every prompt: computed in advance by paged, for each request by the baselines."""
    swap_space: int | None = None
    """Bytes of host memory, e.g. 64GiB, for blocks evicted from the KV memory (paged)."""
    disk_cache_size: int | None = None
    """Bytes on disk for evicted blocks (paged)."""
    disk_bandwidth: float = 3e9
    """Bytes per second that the disk reads, and as many that it writes."""
    attention_slowdown: float = 1.0
    """Time of the attention kernel relative to one for contiguous KV (paged); the paper measures 1.20 to 1.26."""
    ttft_limit: float = 1.0
    """Most seconds to the first token with which a request counts for goodput."""
    tbt_limit: float = 0.2
    """Most seconds per further token, on average over a request, with which it counts for goodput."""
    step_failures: float = 0.0
    """Probability that a step fails for one of its sequences, whose request then ends with an error."""
    slow_steps: float = 0.0
    """Probability that a step takes slow_factor times as long."""
    slow_factor: float = 10.0
    """How many times as long a slow step takes."""
    cancellations: float = 0.0
    """Share of clients that leave before their answer is complete, after patience seconds on average."""
    patience: float = 10.0
    """Mean seconds until such a client leaves; the time is exponentially distributed."""
    engine_deaths: float = 0.0
    """Probability that the engine dies in a step; a new one starts and resumes the running requests."""
    restart_time: float = 5.0
    """Seconds a new engine needs to start."""
    check_every: int = 0
    """Check the invariants of the memory every so many steps; 0: at the end and after each fault only."""

    def __post_init__(self) -> None:
        for name in ("kv_cache_memory", "swap_space", "disk_cache_size"):
            object.__setattr__(self, name, parse_size(name, getattr(self, name)))
        if not self.trace:
            raise ConfigError("no trace is given: set trace to a file of request lengths, or to its name in traces_dir")
        for name, known in (
            ("policy", POLICIES),
            ("arrivals", ARRIVALS),
            ("scheduling_policy", SCHEDULING_POLICIES),
            ("admission", ADMISSIONS),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        for name, low, high in (
            ("num_devices", 1, 4096),
            ("burst_size", 1, 2**20),
            ("num_requests", 1, 10**9),
            ("warm_up", 0, 10**9),
            ("max_tokens", 1, 2**24),
            ("kv_slots", 1, 2**40),
            ("block_size", 1, 1024),
            ("max_num_seqs", 1, 2**16),
            ("max_num_batched_tokens", 1, 2**20),
            ("max_model_len", 1, 2**24),
            ("n", 1, 128),
            ("beam_width", 1, 128),
            ("shared_prefix", 0, 2**24),
            ("check_every", 0, 2**31),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name} is {value}; it must be from {low} to {high}")
        for name in ("step_failures", "slow_steps", "cancellations", "engine_deaths"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; a probability is from 0 to 1")
        for name in ("rate", "duration", "cv", "patience", "ttft_limit", "tbt_limit", "slow_factor", "disk_bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value}; it must be more than 0, and finite")
        if self.attention_slowdown < 1:
            raise ConfigError(f"attention_slowdown is {self.attention_slowdown}; it must be at least 1")
        if not 0 <= self.restart_time < float("inf"):
            raise ConfigError(f"restart_time is {self.restart_time}; it must be at least 0, and finite")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs {self.max_num_seqs}; "
                "raise the one or lower the other"
            )
        if self.saturate and (self.rate is not None or self.duration is not None or self.arrivals != "auto"):
            raise ConfigError("saturate keeps the queue full: leave out rate, duration and arrivals")
        if self.policy != "paged" and (self.scheduling_policy, self.admission) != ("fcfs", "current"):
            raise ConfigError(f"policy {self.policy} is a baseline, first come, first served: leave out the others")
        if self.kv_slots is not None and self.kv_cache_memory is not None:
            raise ConfigError("kv_slots and kv_cache_memory both size the KV memory; give one")
        if self.beam_width is not None and self.n > self.beam_width:
            raise ConfigError(f"n is {self.n}, but {self.beam_width} beams end in at most as many; raise beam_width")
        if self.has_tiers and not (self.policy == "paged" and self.enable_prefix_caching):
            raise ConfigError("swap_space and disk_cache_size are tiers of policy paged with enable_prefix_caching")
        if self.shared_prefix and self.policy == "paged" and not self.enable_prefix_caching:
            raise ConfigError(f"shared_prefix is {self.shared_prefix}, but enable_prefix_caching is off")

    @property
    def num_sequences(self) -> int:
        """Sequences of a request: samples or beams."""
        return self.beam_width or self.n

    @property
    def has_tiers(self) -> bool:
        return self.swap_space is not None or self.disk_cache_size is not None
