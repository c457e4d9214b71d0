"""All flags, keywords, names and methods of vLLM 0.32 (data/vllm_options.json): understood, or refused with advice."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import quire
from quire import LLM, SamplingParams
from quire.cli.commands import run
from quire.config import OPTION_ALIASES, EngineConfig
from quire.errors import ConfigError, RequestError
from quire.server.settings import ServerSettings
from quire.vllm_options import RENAMED
from quire.vllm_rare_options import ALL_FOREIGN_OPTIONS, FOREIGN_VALUES, RARE_OPTIONS, SHORT_FLAGS, TRANSLATED_OPTIONS

THEIRS: dict[str, Any] = json.loads((Path(__file__).parent / "data/vllm_options.json").read_text())
OURS = {field.name for config in (EngineConfig, ServerSettings) for field in fields(config)}
KNOWN = {*OURS, *OPTION_ALIASES, *ALL_FOREIGN_OPTIONS, *TRANSLATED_OPTIONS}
LONG = [flag for kind in THEIRS["flags"].values() for flag in kind if flag.startswith("--") and flag != "--config"]
SHORT = [flag for kind in THEIRS["flags"].values() for flag in kind if not flag.startswith("--")]
INTERNAL = {"model_weights"}
"""Fields that vLLM fills in itself."""


def option(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def test_every_flag_is_known() -> None:
    assert [flag for flag in LONG if option(flag) not in KNOWN] == []
    assert sorted(set(SHORT) - set(SHORT_FLAGS.values())) == []
    assert set(SHORT_FLAGS) <= KNOWN


def test_every_keyword_is_known() -> None:
    assert sorted({*THEIRS["LLM"], *THEIRS["EngineArgs"]} - KNOWN - set(RENAMED) - INTERNAL) == []


def test_the_command_line_takes_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """All at once, each with as many values as vLLM's own parser reads."""
    words = ["serve", "--show-config"]
    for flag in LONG:
        if option(flag) in OURS or option(flag) in OPTION_ALIASES or option(flag) in SHORT_FLAGS:
            continue
        words.append(flag)
        if flag in THEIRS["flags"]["value"] or option(flag) in TRANSLATED_OPTIONS:
            words.append("1")
        elif flag in THEIRS["flags"]["several"]:
            words += ["1", "2"]
    for name, flag in SHORT_FLAGS.items():
        words += [flag] if name in ALL_FOREIGN_OPTIONS and ALL_FOREIGN_OPTIONS[name].is_switch else [flag, "1"]
    assert run(words) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    for name in ("quantization", "speculative-config", "tensor-parallel-size", "kv-offloading-size"):
        assert f"{name} = 1  (flag)" in shown
    (rare,) = [line for line in shown.splitlines() if line.startswith("vllm-options = ")]
    assert {name for name in map(option, LONG) if name in RARE_OPTIONS} == json.loads(rare[15:-8]).keys()


@pytest.mark.parametrize("name", ALL_FOREIGN_OPTIONS)
def test_what_asks_for_nothing_is_accepted_and_the_rest_refused(name: str) -> None:
    foreign = ALL_FOREIGN_OPTIONS[name]
    assert foreign.advice
    for value in (None, *foreign.accepted):
        assert EngineConfig.from_options({name: value}) == EngineConfig()
    if foreign.harmless:
        assert EngineConfig.from_options({name: "other"}) == EngineConfig()
    else:
        with pytest.raises(ConfigError, match=f"{name} is 'other'; "):
            EngineConfig.from_options({name: "other"})


@pytest.mark.parametrize(("name", "values"), FOREIGN_VALUES.items())
def test_values_that_vllm_has(name: str, values: dict[str, str]) -> None:
    for value, advice in values.items():
        for spelling in (value, value.upper()):
            with pytest.raises(ConfigError) as error:
                EngineConfig.from_options({name: spelling})
            assert str(error.value).startswith(f"{name} is {spelling!r}; ")
            assert str(error.value).endswith(advice)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({"kv_offloading_size": 4}, {"swap_space": 4 * 2**30}),
        ({"kv_offloading_size": 0.5}, {"swap_space": 2**29}),
        ({"kv_offloading_size": 0}, {"swap_space": None}),
        ({"limit_mm_per_prompt": '{"image": 3}'}, {"max_images": 3}),
        ({"limit_mm_per_prompt": {"video": 0}}, {"max_images": 16}),
        ({"max_num_queued_reqs": 7}, {"max_queue_size": 7}),
        ({"device_memory_utilization": 0.5}, {"gpu_memory_utilization": 0.5}),
        ({"seed": None}, {"seed": 0}),
        ({"max_logprobs": -1}, {"max_logprobs": 2**20}),
        ({"task": "embedding"}, {"task": "embed"}),
    ],
)
def test_values_that_are_translated(given: dict[str, Any], stored: dict[str, Any]) -> None:
    config = EngineConfig.from_options(given)
    assert {name: getattr(config, name) for name in stored} == stored


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"enable_lora": "yes"}, "enable_lora is 'yes'; it must be True or False"),
        ({"enable_prefix_caching": 0}, "enable_prefix_caching is 0; it must be True or False"),
        ({"seed": "x"}, "seed is 'x'; it must be an integer"),
        ({"speculative_config": {"method": "eagle", "model": "m"}}, "speculative_config asks for 'eagle'; "),
        ({"speculative_config": {"model": "m"}}, "speculative_config asks for 'm'; "),
        ({"limit_mm_per_prompt": "three"}, "limit_mm_per_prompt is 'three'; "),
    ],
)
def test_values_that_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig.from_options(given)
    assert said in str(error.value)


@pytest.mark.parametrize("given", ['["https://a", "https://b"]', ["https://a", "https://b"]])
def test_lists_of_json_in_flags(given: Any) -> None:
    assert ServerSettings(allow_origins=given).allow_origins == ("https://a", "https://b")


def test_lists_that_are_not_json() -> None:
    with pytest.raises(ConfigError, match=r"allow_origins is '\[https://a'; give one value, or a JSON list"):
        ServerSettings(allow_origins=("[https://a",))
    assert ServerSettings(allowed_hosts=("[::1]",)).allowed_hosts == ("[::1]",)


def test_every_field_of_sampling_params() -> None:
    ours = {field.name for field in fields(SamplingParams)}
    for name in set(THEIRS["SamplingParams"]) - ours - {"skip_clone", "output_text_buffer_length"}:
        if name in ("routed_experts_prompt_start", "trace_decode_token_ids"):
            continue  # for options that are refused
        with pytest.raises(RequestError, match=f"SamplingParams has no {name}: (?!leave|did)") as error:
            SamplingParams(**{name: 1})
        assert error.value.param == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [("temprature", "did you mean temperature?"), ("use_beam_search", "set beam_width"), ("zzz", "leave it out")],
)
def test_fields_that_never_were(name: str, hint: str) -> None:
    with pytest.raises(RequestError, match=f"SamplingParams has no {name}: ") as error:
        SamplingParams(**{name: 1})
    assert hint in str(error.value)


def test_every_public_name() -> None:
    for name in {*THEIRS["names"], "GuidedDecodingParams", "RequestOutputKind"} - {"__version_tuple__"}:
        try:
            assert getattr(quire, name)
        except ImportError as error:
            assert str(error).startswith(f"quire has no {name}: ")  # noqa: PT017  either is right


def test_every_method_of_llm() -> None:
    """Weights that are replaced while running are of trainers, which Quire does not serve."""
    llm = LLM.__new__(LLM)
    missing = [name for name in THEIRS["methods"] if not hasattr(LLM, name) and "weight" not in name]
    missing = [name for name in missing if name not in ("get_world_size", "release_kv_cache_memory")]
    assert missing
    for name in missing:
        with pytest.raises(AttributeError, match=f"LLM has no {name}: "):
            getattr(llm, name)
    with pytest.raises(AttributeError, match=r"LLM has no zzz$"):
        llm.zzz  # noqa: B018
