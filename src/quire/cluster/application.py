"""make_application: from options to an application of Ray Serve, a router and its replicas."""

from collections.abc import Mapping
from typing import Any

from ray import serve

from quire.cluster.options import ClusterOptions, ClusterSettings
from quire.cluster.replica import REPLICA, ROUTER, ReplicaDeployment
from quire.cluster.router import INGRESS, RouterDeployment

APP_NAME = "quire"
_MAX_ONGOING = 4096
"""Requests in the router at once, as Serve counts them; the router has limits of its own."""
_SPARE_SECONDS = 10.0
_STARTS = 3
"""Times that a replica is tried to start. Serve's own 20 would take minutes over a model that is not there."""


def make_application(args: Mapping[str, Any]) -> serve.Application:
    """The application for `args`: options of `quire cluster serve` by their names. Raises `ConfigError` for a wrong
    one."""
    options = ClusterOptions.of({key.replace("-", "_"): value for key, value in args.items()})
    seconds = float(options.server.get("shutdown_timeout", 30.0))
    replicas = serve.deployment(
        ReplicaDeployment,
        name=REPLICA,
        ray_actor_options={"num_cpus": options.cluster.num_cpus, "num_gpus": options.cluster.num_gpus},
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=seconds + _SPARE_SECONDS,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=_STARTS,
        max_surge_percent=options.cluster.max_surge_percent,
        **_scale(options.cluster),
    )
    router = serve.deployment(
        serve.ingress(INGRESS)(RouterDeployment),
        name=ROUTER,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=seconds + _SPARE_SECONDS,
        max_surge_percent=100,  # an update stops the old router when the new one can answer
    )
    return router.bind(options, replicas.bind(options))


def _scale(cluster: ClusterSettings) -> dict[str, Any]:
    if not cluster.max_replicas:
        return {"num_replicas": cluster.replicas}
    policy = {
        "policy_function": "quire.cluster.scaling:EngineNumbers",
        "policy_kwargs": {
            "target_queue_seconds": cluster.target_queue_seconds,
            "target_kv_share": cluster.target_kv_share,
        },
    }
    limits = {"min_replicas": cluster.replicas, "max_replicas": cluster.max_replicas}
    delays = {"upscale_delay_s": cluster.upscale_delay, "downscale_delay_s": cluster.downscale_delay}
    # Numbers of a few seconds, not the half minute over which Serve averages the requests that it counts itself.
    looks = {"metrics_interval_s": 2.0, "look_back_period_s": 6.0}
    return {"autoscaling_config": {**limits, **delays, **looks, "policy": policy}}
