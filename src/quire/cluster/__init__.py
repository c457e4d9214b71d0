"""Replicas on Ray Serve (extra ray). `quire.cluster:app` is the application for `serve run` and KubeRay.

Ray places the processes, watches and restarts them, and scales them. Requests do not pass through Ray's own calls: the
router deployment is `quire router`'s application, and speaks HTTP with the replicas.
"""

from collections.abc import Mapping
from typing import Any


def app(args: Mapping[str, Any]) -> Any:
    """The Serve application for `args` (see `quire.cluster.application`)."""
    from quire.cluster.application import make_application  # only where Ray is installed

    return make_application(args)
