"""Keys of config.json that another family owns have no effect; what a family reads is what transformers' class has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quire.errors import CheckpointError
from quire.model_config import ARCHITECTURES, ModelConfig
from quire.model_config.architecture_names import architectures_of
from quire.model_config.family_keys import OPTIONAL_KEYS, OWN_KEYS, reads
from tests.checkpoints import FAMILIES

CLASSES = {model.__name__: config for config, model, _ in FAMILIES.values() if config.__name__ != "InternLM3Config"}

EXTRA = {
    # Files of these families have it at the top; transformers moves it into rope_parameters whatever the class says.
    "partial_rotary_factor": {
        "StableLm",
        "Phi",
        "Phi3",
        "Glm",
        "Glm4",
        "Glm4Moe",
        "Qwen3Next",
        "Qwen3_5",
        "Qwen3_5Moe",
    },
    # Written before there was layer_types; the classes still read it.
    "sliding_window_pattern": {"Gemma2", "Gemma3", "Cohere2", "Cwm", "Olmo3"},
    # Set by rows of families with a second rotary embedding.
    "rope_local_base_freq": {"Gemma3", "Olmo3"},
    # Other names of what the class declares.
    "num_experts": {"DeepseekV3"},
    "first_k_dense_replace": {"Glm4MoeLite"},
    "max_window_layers": {"SmolLM3"},
    "norm_topk_prob": {"Qwen3_5Moe"},
}
"""Keys that rows read although the config class does not declare them."""
UNUSED = {("MixtralForCausalLM", "router_jitter_noise"), ("BambaForCausalLM", "layer_types")}
"""Declared, and read in training alone, or computed from another key."""


def declared(config_class: type[Any]) -> set[str]:
    names = {name for each in config_class.__mro__ for name in getattr(each, "__annotations__", {})}
    return names | set(config_class.attribute_map)


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_row_reads_what_the_class_declares(architecture: str) -> None:
    row, stem = ARCHITECTURES[architecture], architecture.removesuffix("ForCausalLM")
    extra = {key for key, stems in EXTRA.items() if stem in stems}
    unused = {key for name, key in UNUSED if name == architecture}
    found = {key for key in OPTIONAL_KEYS - row.constants.keys() if reads(row, key)}
    assert found == (OPTIONAL_KEYS & declared(CLASSES[architecture])) - unused | extra


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_row_reads_the_second_spellings_of_the_class(architecture: str) -> None:
    row = ARCHITECTURES[architecture]
    ours = {*row.names.values(), *row.names}
    wanted = {alias: name for alias, name in CLASSES[architecture].attribute_map.items() if name in ours}
    assert wanted.items() <= row.aliases.items()


def folder_of(tmp_path: Path, family: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
    config_class, model_class, options = FAMILIES[family]
    config = config_class(**{"initializer_range": 0.12, **options})
    config.architectures = [model_class.__name__]
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    return tmp_path, values


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_others_change_nothing(family: str, tmp_path: Path) -> None:
    folder, values = folder_of(tmp_path, family)
    before, row = ModelConfig.from_folder(folder), ARCHITECTURES[values["architectures"][0]]
    foreign = {key: 3 for key in OPTIONAL_KEYS | OWN_KEYS if not reads(row, key)}
    assert foreign
    path = folder / "config.json"
    path.write_text(json.dumps(values | foreign))
    assert ModelConfig.from_folder(folder) == before


FOREIGN: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"use_sliding_window": False, "max_window_layers": 2}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("llama", {"query_pre_attn_scalar": 3, "final_logit_softcapping": 0.5, "logit_scale": 0.1}),
    ("llama", {"sliding_window": 4, "use_sliding_window": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "attention_factor": 3.0}}),
    ("qwen2", {"attention_bias": True, "mlp_bias": True}),
    ("gpt2", {"num_key_value_heads": 1, "head_dim": 8, "attention_bias": False}),
    ("phi3", {"attention_bias": True, "mlp_bias": True, "lm_head_bias": True}),
    ("bloom", {"alibi": False, "hidden_act": "relu", "num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("family", "changes"), FOREIGN, ids=str)
def test_transformers_ignores_them_too(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder, values = folder_of(tmp_path, family, **changes)
    changed = ModelConfig.from_folder(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    if "rope_parameters" in changes:
        del changes["rope_parameters"]["attention_factor"]
        values |= changes
    (folder / "config.json").write_text(json.dumps(values))
    assert ModelConfig.from_folder(folder) == changed
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(plain(ids).logits, model(ids).logits)


class TestArchitecture:
    def test_model_types_mean_what_they_mean_in_transformers(self) -> None:
        found = architectures_of(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        theirs = {name: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in found}
        # Without a section for text gemma3 means the text model; InternLM 3 is Llama's class there.
        assert {name for name, own in found.items() if theirs[name] != own} <= {"gemma3", "internlm3"}
        assert len(found) >= len(CLASSES) - 2

    @pytest.mark.parametrize("named", [None, [], ["LlamaModel"], ["LLaMAForCausalLM"]])
    def test_model_type_decides_where_no_name_does(self, named: Any, tmp_path: Path) -> None:
        folder, values = folder_of(tmp_path, "llama")
        assert ModelConfig.from_folder(folder_of(tmp_path, "llama", architectures=named)[0]).architecture == (
            "LlamaForCausalLM"
        )
        del values["architectures"]
        (folder / "config.json").write_text(json.dumps(values))
        assert ModelConfig.from_folder(folder).architecture == "LlamaForCausalLM"

    @pytest.mark.parametrize("named", [["LlamaForQuestionAnswering"], ["LlamaForTokenClassification"]])
    def test_other_tasks_are_refused(self, named: list[str], tmp_path: Path) -> None:
        folder, _ = folder_of(tmp_path, "llama", architectures=named)
        with pytest.raises(CheckpointError, match=rf"architectures is {named[0]}; supported are"):
            ModelConfig.from_folder(folder)

    @pytest.mark.parametrize(("num_labels", "task"), [(1, "score"), (4, "classify")])
    def test_a_classifier_is_its_decoder_with_a_head(self, num_labels: int, task: str, tmp_path: Path) -> None:
        labels = {str(index): f"label {index}" for index in range(num_labels)}
        names = ["LlamaForSequenceClassification"]
        config = ModelConfig.from_folder(folder_of(tmp_path, "llama", architectures=names, id2label=labels)[0])
        assert (config.architecture, config.task) == ("LlamaForCausalLM", task)
        assert config.pooling is not None
        assert config.pooling.labels == tuple(labels.values())
