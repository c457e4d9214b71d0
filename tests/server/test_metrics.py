"""/metrics is read by promtool, by OpenMetrics' parser and by Prometheus' own, in the form that a scraper asks for."""

import shutil
import subprocess

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from quire.memory_stats import TierStats
from quire.outputs import EngineStats
from quire.server.metrics import prefers_openmetrics
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain"
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;"
    "q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        (PROMETHEUS_2, True),
        (PROMETHEUS_3, True),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; Version=1.0.0", True),
        ("application/openmetrics-text;q=0.2, text/plain;q=0.9", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;version=2.0.0", False),
        ("application/openmetrics-text;q=much", False),
        ("text/plain", False),
        ("*/*", False),
        ("", False),
        (";,;=", False),
    ],
)
def test_the_form_that_is_asked_for(accept: str, openmetrics: bool) -> None:
    assert prefers_openmetrics(accept) is openmetrics


@pytest.fixture(scope="module")
def forms() -> dict[str, str]:
    """Both forms of one server's metrics: with tiers, answered requests, and an API key with a name."""
    with RunningServer(ScriptedEngine(), ServerSettings(port=0, api_key=("secret",))) as server:
        tiers = {"host": TierStats(), "disk": TierStats()}
        stats = EngineStats(num_blocks=4, total_steps=2, tiers=tiers, prefix_misses={"new": 1})
        server.engine.metrics.record_stats(stats)
        key = {"authorization": "Bearer secret"}
        server.send("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2}, key)
        found = {}
        for name, accept in (("text", "text/plain"), ("openmetrics", PROMETHEUS_3)):
            response, found[name] = server.send("GET", "/metrics", headers={**key, "accept": accept})
            assert response.status == 200
            assert ("openmetrics" in response.headers["content-type"]) is (name == "openmetrics")
        return found


def test_both_forms_have_the_same_samples(forms: dict[str, str]) -> None:
    assert forms["openmetrics"].endswith("\n# EOF\n")
    openmetrics = {sample.name for family in read_openmetrics(forms["openmetrics"]) for sample in family.samples}
    text = {sample.name for family in read_text(forms["text"]) for sample in family.samples}
    assert openmetrics == text
    assert {"quire:steps_total", "vllm:prompt_tokens_total", "http_requests_total"} <= text


def test_no_family_is_described_twice(forms: dict[str, str]) -> None:
    for form in forms.values():
        described = [line.split()[2] for line in form.splitlines() if line.startswith("# TYPE ")]
        assert len(described) == len(set(described))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian package prometheus)")
def test_promtool_reads_it(forms: dict[str, str]) -> None:
    """Its remarks are about vLLM's names alone: their colons, and a histogram that ends in _total."""
    done = subprocess.run(["promtool", "check", "metrics"], input=forms["text"], capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stderr
    for remark in done.stderr.splitlines():
        assert remark.endswith(("should not contain ':'", '"_total" suffix')), remark
    broken = subprocess.run(["promtool", "check", "metrics"], input="a{ 1\n", capture_output=True, text=True)
    assert broken.returncode == 1
