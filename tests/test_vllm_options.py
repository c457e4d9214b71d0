"""Options of vLLM, as keywords and as flags: understood, or refused by name with advice."""

from typing import Any

import pytest

from quire.cli.commands import run
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.vllm_options import FOREIGN_OPTIONS, RENAMED


@pytest.mark.parametrize("name", FOREIGN_OPTIONS)
def test_what_asks_for_nothing_is_accepted_and_the_rest_refused(name: str) -> None:
    option = FOREIGN_OPTIONS[name]
    for value in (None, *option.accepted):
        assert EngineConfig.from_options({name: value}) == EngineConfig()
    other = not option.accepted[0] if option.is_switch else "other"
    if option.harmless:
        assert EngineConfig.from_options({name: other}) == EngineConfig()
        return
    with pytest.raises(ConfigError) as error:
        EngineConfig.from_options({name: other})
    assert str(error.value).startswith(f"{name} is {other!r}; ")
    assert option.advice in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--decode-context-parallel-size", "2"], "decode_context_parallel_size is 2; it must be 1"),
        (["serve", "--decode_context_parallel_size=4"], "decode_context_parallel_size is 4; it must be 1"),
        (["serve", "--trust-remote-code"], "trust_remote_code is True; it must be False"),
        (["serve", "--no-enable-chunked-prefill"], "enable_chunked_prefill is False; it must be True"),
        (["serve", "--chat-template", "a.jinja"], "leave it out: put it into the model's folder"),
        (["generate", "x", "--fully-sharded-loras"], "fully_sharded_loras is True"),
        (["chat", "--cpu-offload-gb", "4"], "cpu_offload_gb is 4; it must be 0"),
        (["plan", "--hf-overrides", "x"], "write it into the model's config.json"),
        (["bench", "throughput", "--decode-context-parallel-size", "2"], "decode_context_parallel_size is 2"),
        # The pasted flags before it ask for nothing; the last one is wrong.
        (
            *(
                [
                    "serve",
                    "--tensor-parallel-size",
                    "1",
                    "--enforce-eager",
                    "--disable-log-requests",
                    "--block-size",
                    "0",
                ],
            ),
            "block_size is 0",
        ),
        (["serve", "--max-model-len", "many"], "max_model_len is 'many'; give a number of tokens, e.g. 32768"),
    ],
)
def test_pasted_flags(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1


def test_the_help_does_not_show_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--help"]) == 0
    assert "context-parallel" not in capsys.readouterr().out
    assert run(["serve", "--show-config"]) == 0
    assert "context-parallel" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "tokens"),
    [("32k", 32_000), ("32K", 32_768), ("25.6k", 25_600), ("1M", 2**20), ("512", 512), ("auto", None), (-1, None)],
)
def test_spellings_of_a_length(given: Any, tokens: int | None) -> None:
    assert EngineConfig.from_options({"max_model_len": given}).max_model_len == tokens


@pytest.mark.parametrize(
    ("given", "stored"),
    [({"swap_space": 0}, {"swap_space": None}), ({"generation_config": "vllm"}, {"generation_config": "none"})],
)
def test_other_values_of_vllm(given: dict[str, Any], stored: dict[str, Any]) -> None:
    config = EngineConfig.from_options(given)
    assert {name: getattr(config, name) for name in stored} == stored


@pytest.mark.parametrize("name", RENAMED)
def test_names_of_other_engines_are_pointed_to_ours(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option {name}; did you mean {RENAMED[name]}"):
        EngineConfig.from_options({name: 1})
