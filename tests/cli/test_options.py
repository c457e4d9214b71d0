"""Flags are the fields of option classes; values arrive in the classes' types."""

from dataclasses import fields
from typing import Any

import pytest
from cyclopts import App

from quire.cli.options import field_docs, flags, split
from quire.config import EngineConfig
from quire.server.settings import ServerSettings
from quire.simulation.settings import SimulationSettings
from quire.speculative_config import SpeculativeConfig


def parsed(*arguments: str) -> dict[str, Any]:
    """The options that a command with all flags receives."""
    app = App(result_action="return_value")

    @app.default
    @flags(EngineConfig, ServerSettings)
    def command(model: str = "", **options: Any) -> dict[str, Any]:
        return {"model": model, **options}

    received: dict[str, Any] = app(list(arguments), exit_on_error=False, print_error=False)
    return received


def test_only_given_flags_arrive() -> None:
    assert parsed() == {"model": ""}
    assert parsed("DIR", "--port", "80", "--max-num-seqs=4") == {
        "model": "DIR",
        "port": 80,
        "max_num_seqs": 4,
    }
    assert parsed("--model", "DIR") == {"model": "DIR"}


def test_lists_sizes_switches_and_other_names() -> None:
    options = parsed(
        *(
            "--served-model-name",
            "a",
            "--served-model-name",
            "b",
            "--no-enable-prefix-caching",
            "--max_model_len",
            "9",
        ),
        *("--kv-cache-memory-bytes", "1GiB", "--num-gpu-blocks-override", "7", "--max-body-size", "1MB"),
        *("--allow-unauthenticated", "--stall-timeout", "2"),
        *("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 7}'),
    )
    engine_options, server_options = split(options, EngineConfig, ServerSettings)
    config = EngineConfig.from_options(engine_options)
    assert config.served_model_name == ("a", "b")
    assert not config.enable_prefix_caching
    assert (config.max_model_len, config.kv_cache_memory, config.num_blocks) == (9, 2**30, 7)
    assert config.speculative_config == SpeculativeConfig(num_speculative_tokens=7)
    settings = ServerSettings(**server_options)
    assert (settings.max_body_size, settings.stall_timeout, settings.allow_unauthenticated) == (
        10**6,
        2.0,
        True,
    )


def test_keys_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_API_KEY", "from-environment")
    assert parsed()["api_key"] == ("from-environment",)
    assert parsed("--api-key", "given")["api_key"] == ("given",)


@pytest.mark.parametrize("config", [EngineConfig, ServerSettings, SimulationSettings])
def test_fields_explain_themselves(config: type) -> None:
    docs = field_docs(config)
    undocumented = {field.name for field in fields(config)} - docs.keys()
    assert undocumented <= {"enable_prefix_caching"}
