"""ClusterOptions: what a cluster runs. They come from flags, or from the `args` of a Serve config file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.router.settings import RouterSettings
from quire.routing.policies import POLICIES
from quire.server.settings import ServerSettings

_NOT_FOR_REPLICAS = frozenset({"host", "port", "uds"})
_PLACEHOLDER = "http://replica"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """Options of the cluster itself. Raises `ConfigError` for a value out of range."""

    replicas: int = 1
    """Replicas of the model; with max_replicas, the fewest."""
    max_replicas: int = 0
    """Most replicas; more are started when requests queue or the KV cache fills up. 0: always `replicas`."""
    num_cpus: float = 1.0
    """Processors that Ray reserves for a replica."""
    num_gpus: float = 0.0
    """GPUs that Ray reserves for a replica."""
    policy: str = "least-work"
    """How the router chooses a replica: least-work, round-robin, least-load, sticky or longest-prefix."""
    target_queue_seconds: float = 2.0
    """Predicted seconds in a replica's queue above which replicas are added."""
    target_kv_share: float = 0.85
    """Share of a replica's KV cache in use above which replicas are added."""

    upscale_delay: float = 30.0
    """Seconds that replicas must be short before more are started."""
    downscale_delay: float = 600.0
    """Seconds that replicas must be idle before some are drained and ended."""

    max_surge_percent: int = 0
    """Extra replicas during a rolling update, in percent. Above 0, old ones serve until new ones are ready, which needs
    room for both; 0 stops old ones first."""

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= 4096:
            raise ConfigError(f"replicas is {self.replicas}; it must be from 1 to 4096")
        if self.max_replicas and self.max_replicas < self.replicas:
            raise ConfigError(f"max_replicas is {self.max_replicas}, less than replicas {self.replicas}")
        for name, end in (("num_cpus", 1e4), ("num_gpus", 1e4), ("upscale_delay", 1e6), ("downscale_delay", 1e6)):
            if not 0 <= getattr(self, name) < end:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0 and below {end:.0f}")
        if not 0 <= self.max_surge_percent <= 100:
            raise ConfigError(f"max_surge_percent is {self.max_surge_percent}; it must be from 0 to 100")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy is {self.policy!r}; it must be one of {', '.join(POLICIES)}")
        if not self.target_queue_seconds > 0 or not 0 < self.target_kv_share <= 1:
            raise ConfigError("target_queue_seconds must be above 0, and target_kv_share above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Everything that a cluster is made from, as plain values: they travel to the replicas."""

    cluster: ClusterSettings
    engine: dict[str, Any] = field(default_factory=dict)
    """Options of `EngineConfig`."""
    server: dict[str, Any] = field(default_factory=dict)
    """Options of `ServerSettings`."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "ClusterOptions":
        """Sort options by what they belong to. Raises `ConfigError` for one that is wrong or unknown, at once and not
        in a replica."""
        cluster_names, server_names = _names(ClusterSettings), _names(ServerSettings) - _NOT_FOR_REPLICAS
        cluster = {name: value for name, value in options.items() if name in cluster_names}
        server = {name: value for name, value in options.items() if name in server_names}
        engine = {name: value for name, value in options.items() if name not in cluster_names | server_names}
        EngineConfig.from_options(engine)
        ServerSettings(**server)
        return cls(ClusterSettings(**cluster), engine, server)

    def router_settings(self) -> RouterSettings:
        """The router's settings. Replicas tell it their addresses themselves."""
        return RouterSettings(
            backends=(_PLACEHOLDER,), policy=self.cluster.policy, backend_api_key=self._any_key(), health_interval=0.5
        )

    def _any_key(self) -> str | None:
        keys = ServerSettings(**self.server).api_key
        return keys[0] if keys else None


def _names(settings: type) -> set[str]:
    return {each.name for each in fields(settings) if each.init}
