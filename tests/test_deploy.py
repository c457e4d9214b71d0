"""Holds the files in deploy/ to the code: flags, metrics, routes, file names; and the chart to the manifests."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from quire.cli.commands import run
from quire.engine.metrics import Metrics
from quire.memory_stats import TierStats
from quire.outputs import EngineStats
from quire.server.app import ENDPOINTS
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm/quire"
MANIFESTS = DEPLOY / "kubernetes/quire.yaml"
RELEASE = "quire"
PUBLIC = {endpoint.path for endpoint in ENDPOINTS if endpoint.public}


BESIDE_PYTHON = str(Path(sys.executable).parent)
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=BESIDE_PYTHON)
HELM = shutil.which("helm") or shutil.which("helm", path=BESIDE_PYTHON)
needs_helm = pytest.mark.skipif(HELM is None, reason="needs helm (make test-deploy)")


def load(file: str) -> Any:
    return yaml.safe_load((DEPLOY / file).read_text())


# The chart, in the part of Helm's language that it uses.


def value_of(name: str, values: dict[str, Any]) -> Any:
    found: Any = {"Values": values, "Release": {"Name": RELEASE}}
    for part in name.removeprefix(".").split("."):
        found = found[part]
    return found


def expression(text: str, values: dict[str, Any]) -> str:
    """What one {{ … }} writes. Raises `ValueError` for what this test does not know of Helm."""
    match text.split():
        case ["add", name, number]:
            return str(value_of(name, values) + int(number))
        case ["toYaml", name, "|", "nindent", width]:
            shown = yaml.safe_dump(value_of(name, values), sort_keys=True).rstrip()
            return "".join(f"\n{' ' * int(width)}{line}" for line in shown.splitlines())
        case [name, "|", "quote"]:
            return json.dumps(str(value_of(name, values)))
        case [name] if name.startswith("."):
            return str(value_of(name, values))
    raise ValueError(text)


def render(template: str, values: dict[str, Any]) -> str:
    """`template` as `helm template` writes it."""
    kept: list[str] = []
    shown = True
    for line in template.splitlines(keepends=True):
        if begun := re.fullmatch(r"\s*\{\{- if (\S+) \}\}\n", line):
            assert shown, "nested conditions"
            shown = bool(value_of(begun[1], values))
        elif re.fullmatch(r"\s*\{\{- end \}\}\n", line):
            shown = True
        elif shown:
            kept.append(line)
    text = "".join(kept)
    text = re.sub(r"\s*\{\{- (.+?) \}\}", lambda found: expression(found[1], values), text)
    return re.sub(r"\{\{ (.+?) \}\}", lambda found: expression(found[1], values), text)


def chart(**changes: Any) -> str:
    """All objects of the chart, with its own values and `changes`."""
    values = {**load("helm/quire/values.yaml"), **changes}
    return "".join(f"---\n{render(path.read_text(), values)}" for path in sorted(CHART.glob("templates/*.yaml")))


def stateful_set(text: str) -> Any:
    (found,) = [made for made in yaml.safe_load_all(text) if made["kind"] == "StatefulSet"]
    return found["spec"]["template"]["spec"]


def test_the_manifests_are_the_chart_with_its_own_values() -> None:
    assert list(yaml.safe_load_all(MANIFESTS.read_text())) == list(yaml.safe_load_all(chart()))


def test_values_reach_the_pod() -> None:
    pod = stateful_set(chart(extraArgs=["--max-num-seqs=8"], nodeSelector={"a": "b"}, model="org/name", port=9000))
    (container,) = pod["containers"]
    assert container["args"][0] == "org/name"
    assert container["args"][-1] == "--max-num-seqs=8"
    assert "--port=9000" in container["args"]
    assert container["ports"][0]["containerPort"] == 9000
    assert pod["nodeSelector"] == {"a": "b"}
    assert "nodeSelector" not in stateful_set(chart())


def test_the_pod_is_probed_drained_and_confined() -> None:
    pod = stateful_set(MANIFESTS.read_text())
    (container,) = pod["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    before_sigterm = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    (drain,) = [arg.partition("=")[2] for arg in container["args"] if arg.startswith("--shutdown-timeout=")]
    assert pod["terminationGracePeriodSeconds"] >= before_sigterm + int(drain) + 10
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert pod["securityContext"]["runAsNonRoot"]
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/data", "/tmp"}


# Flags.


def commands() -> dict[str, list[str]]:
    """The words behind `quire serve` in each file."""
    unit = (DEPLOY / "quire.service").read_text()
    (program,) = re.findall(r"^ExecStart=/\S+/quire serve (.+)$", unit, flags=re.M)
    compose = load("docker-compose.yml")["services"]["quire"]["command"]
    return {
        "quire.service": shlex.split(program),
        "docker-compose.yml": [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in compose],
        "kubernetes": stateful_set(MANIFESTS.read_text())["containers"][0]["args"],
    }


@pytest.mark.parametrize("name", list(commands()))
def test_every_flag_is_one_of_the_server(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = commands()[name]
    assert run(["serve", "--show-config", *words]) == 0
    shown = capsys.readouterr().out
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"^{word[2:].partition('=')[0]} = .*\(flag\)$", shown, flags=re.M), word
    assert re.search(r"^api-key-file = ", shown, flags=re.M)


def test_a_flag_that_does_not_exist_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--show-config", "--disk-cach=/data/kv"]) == 2


def test_variables_of_the_unit_and_the_image_exist(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join((DEPLOY / name).read_text() for name in ("Dockerfile", "quire.service"))
    named = dict(re.findall(r"\b(QUIRE_[A-Z_]+)=([\w./-]+)", text))
    assert set(named) == {"QUIRE_HOST", "QUIRE_MODEL"}
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    assert run(["serve", "--show-config"]) == 0
    assert capsys.readouterr().out.count("(env)") == len(named)


# systemd, Docker.


def test_the_unit_waits_for_the_server_and_for_its_requests() -> None:
    unit = (DEPLOY / "quire.service").read_text()
    options = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    assert (options["Type"], options["KillMode"]) == ("notify", "mixed")
    (drain,) = re.findall(r"--shutdown-timeout (\d+)", options["ExecStart"])
    assert int(options["TimeoutStopSec"]) >= int(drain) + 10


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "quire.service"
    unit.write_text((DEPLOY / "quire.service").read_text().replace("/opt/quire/bin/quire", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_socket(tmp_path: Path) -> None:
    for name in ("quire.service", "quire.socket"):
        (tmp_path / name).write_text((DEPLOY / name).read_text().replace("/opt/quire/bin/quire", "/bin/true"))
    command = ["systemd-analyze", "verify", str(tmp_path / "quire.socket")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_socket_is_the_port_that_others_use() -> None:
    """One stream socket, which the service takes; and the same port as the image's."""
    lines = (DEPLOY / "quire.socket").read_text().splitlines()
    (port,) = [line.partition("=")[2] for line in lines if line.startswith("Listen")]
    assert ("EXPOSE", port) in instructions()
    assert "Accept=yes" not in lines


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian package prometheus)")
def test_promtool_accepts_rules_and_scrapes() -> None:
    rules = ["promtool", "check", "rules", str(DEPLOY / "prometheus/alerts.yml")]
    done = subprocess.run(rules, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in ("prometheus.yml", "kubernetes.yml"):
        command = ["promtool", "check", "config", "--syntax-only", str(DEPLOY / "prometheus" / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        # Debian's promtool knows no Kubernetes.
        assert done.returncode == 0 or "field kubernetes_sd_configs not found" in done.stderr, (name, done.stderr)


def helm(*words: str) -> "subprocess.CompletedProcess[str]":
    assert HELM is not None
    return subprocess.run([HELM, *words], capture_output=True, text=True, timeout=60)


@needs_helm
def test_helm_accepts_the_chart() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


@needs_helm
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"extraArgs": ["--max-num-seqs=8", "--quantization=int8"], "port": 9000, "model": "org/name"},
        {"nodeSelector": {"a": "b"}, "tolerations": [{"key": "gpu", "operator": "Exists"}], "shutdownTimeout": 5},
    ],
)
def test_helm_writes_what_these_tests_read(changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(changes))
    done = helm("template", RELEASE, str(CHART), "--values", str(tmp_path / "values.yaml"))
    assert done.returncode == 0, done.stderr
    assert list(yaml.safe_load_all(done.stdout)) == list(yaml.safe_load_all(chart(**changes)))


def test_every_value_has_a_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["properties"].keys() - {"global"} == load("helm/quire/values.yaml").keys()
    assert schema["additionalProperties"] is False


@needs_helm
@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("replicas=many", "replicas"),
        ("apiKeySecret=x", "apiKeySecret"),
        ("port=0", "port"),
        ("storage.size=lots", "storage/size"),
        ("extraArgs=--x", "extraArgs"),
        ("image=", "image"),
    ],
)
def test_helm_refuses_wrong_values(given: str, named: str) -> None:
    done = helm("template", RELEASE, str(CHART), "--set", given)
    assert done.returncode != 0
    assert named in done.stderr


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (make test-deploy)")
def test_hadolint_accepts_the_image() -> None:
    # DL3008 wants versions of Debian's packages; the image's release decides them.
    assert HADOLINT is not None
    command = [HADOLINT, "--ignore", "DL3008", str(DEPLOY / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_kubernetes_knows_every_field_of_the_manifests() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for made in yaml.safe_load_all(MANIFESTS.read_text()):
        validate.validate(made, validate.latest_version(), strict=True)


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile; continued lines are joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def test_the_files_of_the_image_exist_and_are_sent_to_the_builder() -> None:
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [
        source
        for name, rest in instructions()
        if name in ("COPY", "ADD") and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    ]
    assert {"src", "csrc", "pyproject.toml", "CMakeLists.txt"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in allowed, source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {project["readme"], *project["license-files"]}
    assert needed <= set(copied)


def test_the_image_runs_quire_as_a_user_and_asks_it_for_its_health() -> None:
    last = dict(instructions())
    assert last["USER"].split(":")[0] not in ("0", "root")
    assert json.loads(last["ENTRYPOINT"]) == ["quire", "serve"]
    (asked,) = re.findall(r"http://127\.0\.0\.1:8000(/[\w/]+)", last["HEALTHCHECK"])
    assert asked == "/health/live"
    service = load("docker-compose.yml")["services"]["quire"]
    assert service["read_only"]
    assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).exists()


def test_files_that_compose_mounts_exist() -> None:
    for service in load("docker-compose.yml")["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith("./") or (DEPLOY / source).exists(), source
    for file in load("prometheus/prometheus.yml")["rule_files"]:
        assert (DEPLOY / "prometheus" / file).exists()


# Metrics.

_PROMQL = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset"}
_TARGET_LABELS = {"instance", "job", "pod", "le"}
_GRAFANA = re.compile(r"label_values\((.+), \w+\)")


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Name of each sample of /metrics → its labels, of a server with tiers that has answered requests."""
    metrics = Metrics("m")
    tiers = {"host": TierStats(), "disk": TierStats()}
    with RunningServer(ScriptedEngine(metrics=metrics)) as server:
        metrics.record_stats(EngineStats(num_blocks=4, total_steps=1, tiers=tiers, prefix_misses={"new": 1}))
        server.send("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2})
        server.send("GET", "/health/ready")
        text = server.send("GET", "/metrics")[1]
    names: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


def expressions() -> Iterator[tuple[str, str]]:
    """(where it stands, PromQL) of every alert and panel."""
    for group in load("prometheus/alerts.yml")["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    board = json.loads((DEPLOY / "grafana/quire.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in board["templating"]["list"]:
        if asked := _GRAFANA.fullmatch(variable["query"]):
            yield variable["name"], asked[1]


def faults(query: str, exported: dict[str, set[str]]) -> list[str]:
    """What `query` names and /metrics does not have: metrics, and labels of metrics."""
    found: list[str] = []
    bare = re.sub(r"\[[^\]]*\]", "", query)
    matchers = re.findall(r"([\w:]+)\{(.*?)\}", bare)
    bare = re.sub(r"\{.*?\}", "", bare)
    grouped = [
        label for group in re.findall(r"\b(?:by|without) \(([^)]*)\)", bare) for label in re.findall(r"\w+", group)
    ]
    bare = re.sub(r"\b(?:by|without) \([^)]*\)", "", bare)
    names = [name for name in re.findall(r"\b[a-zA-Z_][\w:]*\b(?!\s*\()", bare) if name not in _PROMQL]
    known = set().union(_TARGET_LABELS, *(exported.get(name, set()) for name in names))
    found += [name for name in names if name not in exported]
    found += [label for label in grouped if label not in known]
    for name, labels in matchers:
        used = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", labels)
        found += [f"{name}{{{label}}}" for label in used if label not in exported.get(name, set()) | _TARGET_LABELS]
    return found


@pytest.mark.parametrize(("place", "query"), list(expressions()))
def test_every_metric_and_label_exists(place: str, query: str, exported: dict[str, set[str]]) -> None:
    assert faults(query, exported) == [], place
    assert query.count("(") == query.count(")")


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("rate(quire:no_such_total[5m]) > 1", "quire:no_such_total"),
        ("up == 1 and quire:steps > 0", "quire:steps"),
        ('http_requests_total{code="200"}', "http_requests_total{code}"),
        ("sum by (colour) (quire:kv_tier_bytes)", "colour"),
    ],
)
def test_a_metric_that_does_not_exist_is_found(query: str, fault: str, exported: dict[str, set[str]]) -> None:
    assert faults(query, exported) == [fault]


def test_alerts_ask_for_routes_that_exist() -> None:
    routes = re.findall(r'handler="([^"]+)"', (DEPLOY / "prometheus/alerts.yml").read_text())
    assert routes
    assert set(routes) <= PUBLIC


def test_alerts_name_labels_that_their_result_has() -> None:
    """A result that is summed by labels has no others."""
    for group in load("prometheus/alerts.yml")["groups"]:
        for rule in group["rules"]:
            shown = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
            if "by (" in rule["expr"]:
                kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"]))))
                assert shown <= kept, rule["alert"]


@pytest.mark.parametrize(
    "path", [p for p in DEPLOY.rglob("*.y*ml") if "templates" not in p.parts], ids=lambda p: str(p.relative_to(DEPLOY))
)
def test_every_yaml_file_is_read(path: Path) -> None:
    assert list(yaml.safe_load_all(path.read_text()))
