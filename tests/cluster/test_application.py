"""What `quire cluster serve` and KubeRay's config say, without Ray."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from quire.cli import main
from quire.cluster.options import ClusterOptions
from quire.cluster.router import INGRESS
from quire.errors import ConfigError

RAY_SERVICE = Path(__file__).parents[2] / "deploy/kubernetes/rayservice.yaml"


def serve_config() -> dict[str, Any]:
    """The config of the Serve application that KubeRay deploys."""
    manifest = yaml.safe_load(RAY_SERVICE.read_text())
    config: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    return config


def test_the_config_for_kuberay_has_options_that_there_are(tmp_path: Path) -> None:
    (application,) = serve_config()["applications"]
    assert application["import_path"] == "quire.cluster:app"
    (tmp_path / "keys").write_text("sk-a-key-of-the-secret\n")
    options = ClusterOptions.of({**application["args"], "api_key_file": str(tmp_path / "keys")})
    assert (options.cluster.replicas, options.cluster.max_replicas) == (2, 4)
    assert options.server["shutdown_timeout"] == 60


def test_the_routers_process_has_one_ingress() -> None:
    """Serve pickles the ingress into the router's process, where `RouterDeployment` fills the module's own."""
    assert copy.copy(INGRESS) is INGRESS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 0}, "replicas is 0; it must be from 1 to 4096"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas is 2, less than replicas 3"),
        ({"num_cpus": -1}, "num_cpus is -1"),
        ({"downscale_delay": -1.0}, "downscale_delay is -1.0; it must be at least 0"),
        ({"max_surge_percent": 101}, "max_surge_percent is 101; it must be from 0 to 100"),
        ({"policy": "best"}, "policy is 'best'; it must be one of least-work"),
        ({"target_kv_share": 2}, "target_kv_share above 0 and at most 1"),
        ({"block_sise": 16}, "block_sise"),
        ({"shutdown_timeout": -1.0}, "shutdown_timeout"),
    ],
)
def test_wrong_options_are_named_before_a_replica_starts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClusterOptions.of(options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "clusters need Ray; install it with: pip install 'quire-llm[ray]'"),
        (["--replicas", "0"], "replicas is 0"),
        (["--host", "0.0.0.0"], "--api-key"),
        (["--port", "70000"], "port is 70000"),
    ],
)
def test_cluster_serve_says_what_is_wrong(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    for name in [name for name in sys.modules if name in ("quire.cluster.start", "quire.cluster.application")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as ended:
        main(["cluster", "serve", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
