"""ClusterSettings: the options of a simulated cluster, beside those of each replica (`SimulationSettings`)."""

from dataclasses import dataclass, field

from quire.errors import ConfigError
from quire.routing.policies import POLICIES

AGENTS, GROUPS = "agents", "groups"
"""The traces that are made: sessions of agents, and groups of prompts that share their beginning."""
MADE_TRACES = (AGENTS, GROUPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """Options of a cluster. Raises `ConfigError` for a value out of range."""

    cluster: int = 0
    """Replicas behind a router; 0: one engine without a router. --trace agents makes sessions of agents, which
    --rate and --num-requests then count; --trace groups makes prompts that share their beginning, as in llm-d's
    benchmark."""
    routing: str = "least-work"
    """How the router chooses a replica: least-work, round-robin, least-load, sticky or longest-prefix. Give several as
    least-work,round-robin."""
    event_delay: float = 0.1
    """Seconds until the router knows what a replica has stored or evicted."""
    max_replica_requests: int = 0
    """Requests that one replica is sent at once; more are refused. 0: no limit."""
    deaths: tuple[str, ...] = ()
    """Replicas that die, as SECONDS:REPLICA. They come back empty after restart_time; their requests go on elsewhere.
    Repeat for several."""
    rolling_update: float | None = None
    """Second at which all replicas begin to be replaced, one after the other: each finishes its requests first."""
    num_kinds: int = 4
    """Kinds of agents: sessions of one kind have the same system prompt."""
    death_times: tuple[tuple[float, int], ...] = field(init=False, default=())
    """`deaths` as (seconds, replica)."""

    def __post_init__(self) -> None:
        if not 0 <= self.cluster <= 4096:
            raise ConfigError(f"cluster is {self.cluster}; it must be from 0 to 4096 replicas")
        if self.routing not in POLICIES:
            raise ConfigError(f"routing is {self.routing!r}; it must be one of {', '.join(POLICIES)}")
        if not 0 <= self.event_delay < float("inf"):
            raise ConfigError(f"event_delay is {self.event_delay}; it must be at least 0 seconds, and finite")
        if self.max_replica_requests < 0 or self.num_kinds < 1:
            raise ConfigError("max_replica_requests must be at least 0, and num_kinds at least 1")
        if self.rolling_update is not None and not 0 <= self.rolling_update < float("inf"):
            raise ConfigError(f"rolling_update is {self.rolling_update}; it must be at least 0 seconds, and finite")
        deaths: tuple[str, ...] | str = self.deaths
        given = (deaths,) if isinstance(deaths, str) else deaths
        object.__setattr__(self, "death_times", tuple(self._death(text) for text in given))

    def _death(self, text: str) -> tuple[float, int]:
        try:
            seconds, replica = text.split(":")
            when, which = float(seconds), int(replica)
        except ValueError:
            raise ConfigError(f"deaths has {text!r}; write it as SECONDS:REPLICA, such as 60:3") from None
        if not (0 <= when < float("inf") and 0 <= which < self.cluster):
            raise ConfigError(
                f"deaths has {text!r}; seconds are at least 0, and the replicas are 0 to {self.cluster - 1}"
            )
        return when, which
