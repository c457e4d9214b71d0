"""config.json in its many spellings, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from quire.errors import CheckpointError
from quire.model_config import ARCHITECTURES, ModelConfig, RopeConfig
from quire.model_config.activation import DENSE_ACTIVATIONS

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}


def read(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def refusal(folder: Path, config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder, config)
    return str(caught.value).replace(str(folder), "FOLDER")


def test_llama_with_every_default(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=160,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        norm_eps=1e-5,
        rope=RopeConfig(original_max_position=512),
        layer_windows=(0, 0, 0, 0),
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_heads_default_to_one_kv_head_each(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert read(tmp_path, config).num_kv_heads == 8


def test_gpt2_has_its_own_names(tmp_path: Path) -> None:
    gpt2 = {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "eos_token_id": 50256,
    }
    config = read(tmp_path, gpt2)
    assert (config.hidden_size, config.intermediate_size, config.num_layers, config.head_dim) == (
        768,
        3072,
        12,
        64,
    )
    assert (config.norm, config.norm_bias) == ("layer_norm", True)
    assert not config.gated_mlp
    assert config.rope is None
    assert config.activation == "gelu_tanh"
    assert config.tie_word_embeddings
    assert config.context_length == 1024
    assert config.spec.num_parameters == 124_439_808  # as its model card says: 124M
    assert refusal(tmp_path, gpt2 | {"n_head": 7}) == (
        "FOLDER/config.json: n_embd is 768; supported: a multiple of num_attention_heads 7"
    )
    assert refusal(tmp_path, gpt2 | {"scale_attn_by_inverse_layer_idx": True}) == (
        "FOLDER/config.json: scale_attn_by_inverse_layer_idx is true; supported: false"
    )


def test_qwen_biases_and_norms(tmp_path: Path) -> None:
    qwen2 = read(tmp_path, QWEN2)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = read(tmp_path, LLAMA | {"architectures": ["Qwen3ForCausalLM"]})
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, True, 128)


class TestRope:
    def test_old_and_new_spelling_are_the_same(self, tmp_path: Path) -> None:
        scaling = {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
        old = read(tmp_path, LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
        new = read(tmp_path, LLAMA | {"rope_parameters": {**scaling, "rope_theta": 5e5}})
        assert old == new
        assert old.rope == RopeConfig(theta=5e5, rope_type="llama3", factor=8.0, original_max_position=128)
        assert old.context_length == 512

    def test_oldest_spelling_of_the_type(self, tmp_path: Path) -> None:
        config = read(tmp_path, LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}})
        assert config.rope == RopeConfig(rope_type="linear", factor=2.0, original_max_position=512)

    @pytest.mark.parametrize(
        ("scaling", "expected"),
        [
            ({"rope_type": "linear", "factor": 4.0}, 2048),
            ({"rope_type": "dynamic", "factor": 2.0}, 1024),
            ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
            ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ],
        ids=str,
    )
    def test_scaling_stretches_the_context(self, scaling: dict[str, Any], expected: int, tmp_path: Path) -> None:
        assert read(tmp_path, LLAMA | {"rope_scaling": scaling}).context_length == expected

    @pytest.mark.parametrize(
        ("scaling", "message"),
        [
            (
                {"rope_type": "proportional", "factor": 4.0},
                'rope_scaling.rope_type is "proportional"; supported: default, linear, dynamic, llama3, yarn, longrope',
            ),
            ({"rope_type": "linear"}, "rope_scaling.factor is missing; supported: a positive number"),
            (
                {"rope_type": "linear", "factor": "8"},
                'rope_scaling.factor is "8"; supported: a positive number',
            ),
            (
                {"rope_type": "linear", "factor": -1},
                "rope_scaling.factor is -1; supported: a positive number",
            ),
        ],
    )
    def test_refusals(self, scaling: dict[str, Any], message: str, tmp_path: Path) -> None:
        assert refusal(tmp_path, LLAMA | {"rope_scaling": scaling}) == f"FOLDER/config.json: {message}"


class TestWindows:
    def test_mistral_has_one_for_all_layers(self, tmp_path: Path) -> None:
        mistral = LLAMA | {"architectures": ["MistralForCausalLM"]}
        assert read(tmp_path, mistral).layer_windows == (4096,) * 4
        assert read(tmp_path, mistral | {"sliding_window": 100}).layer_windows == (100,) * 4
        assert read(tmp_path, mistral | {"sliding_window": None}).layer_windows == (0,) * 4

    def test_llama_has_none(self, tmp_path: Path) -> None:
        assert read(tmp_path, LLAMA | {"sliding_window": 100}).layer_windows == (0,) * 4

    def test_qwen_has_them_only_if_asked_and_from_a_layer_on(self, tmp_path: Path) -> None:
        windows = {"sliding_window": 100, "max_window_layers": 3}
        assert read(tmp_path, QWEN2 | windows).layer_windows == (0,) * 4
        assert read(tmp_path, QWEN2 | windows | {"use_sliding_window": True}).layer_windows == (0, 0, 0, 100)

    @pytest.mark.parametrize(
        "layer_types",
        [["sliding_attention"] * 2, ["chunked_attention"] * 2, ["full_attention"], "full_attention"],
        ids=str,
    )
    def test_without_a_window_no_layer_has_one(self, layer_types: object, tmp_path: Path) -> None:
        values = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2, "use_sliding_window": False}
        assert "supported: 2 times full_attention where use_sliding_window" in refusal(
            tmp_path, LLAMA | values | {"layer_types": layer_types}
        )
        without = refusal(tmp_path, LLAMA | values | {"layer_types": layer_types, "sliding_window": None})
        if layer_types == ["sliding_attention"] * 2:
            assert "sliding_window is missing; supported: a number of positions, since layers with a window" in without
        else:
            assert "supported: 2 times full_attention where there is no sliding_window" in without
        assert read(tmp_path, LLAMA | values | {"layer_types": ["full_attention"] * 2}).layer_windows in ((), (0, 0))

    def test_layer_types_decide(self, tmp_path: Path) -> None:
        types = ["sliding_attention", "full_attention"] * 2
        options = QWEN2 | {"use_sliding_window": True, "sliding_window": 9, "layer_types": types}
        assert read(tmp_path, options).layer_windows == (9, 0, 9, 0)
        assert refusal(tmp_path, options | {"layer_types": ["linear_attention"] * 4}).endswith(
            "supported: 4 times one of full_attention, sliding_attention"
        )


class TestTokensAndDtype:
    @pytest.mark.parametrize(
        ("config", "generation", "expected"),
        [
            (2, None, (2,)),
            ([2, 3], None, (2, 3)),
            (None, None, ()),
            (2, {"eos_token_id": [4, 5]}, (4, 5)),
            (2, {"temperature": 0.5}, (2,)),
        ],
    )
    def test_end_tokens(
        self, config: Any, generation: dict[str, Any] | None, expected: tuple[int, ...], tmp_path: Path
    ) -> None:
        assert read(tmp_path, LLAMA | {"eos_token_id": config}, generation).eos_token_ids == expected

    @pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
    def test_dtype(self, key: str, tmp_path: Path) -> None:
        for value, expected in {
            "bfloat16": "bfloat16",
            "torch.bfloat16": "bfloat16",
            "half": "float16",
            "torch.double": "float32",
            "auto": "float32",
            None: "float32",
        }.items():
            assert read(tmp_path, LLAMA | {key: value}).checkpoint_dtype == expected
        assert refusal(tmp_path, LLAMA | {key: "float8_e4m3fn"}) == (
            f'FOLDER/config.json: {key} is "float8_e4m3fn"; supported: float32, float16, bfloat16'
        )


class TestRefusals:
    def test_unknown_architecture(self, tmp_path: Path) -> None:
        assert refusal(tmp_path, LLAMA | {"architectures": ["T5Model"]}) == (
            f"FOLDER/config.json: architectures is T5Model; supported are {', '.join(ARCHITECTURES)}"
        )

    def test_one_architecture_need_not_be_a_list(self, tmp_path: Path) -> None:
        assert read(tmp_path, LLAMA | {"architectures": LLAMA["architectures"][0]}) == read(tmp_path, LLAMA)

    @pytest.mark.parametrize(("model_type", "warns"), [("mistral", True), ("llama", False), ("kimi_k2", False)])
    def test_a_type_of_another_family_is_told(
        self, model_type: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert read(tmp_path, LLAMA | {"model_type": model_type}).architecture == "LlamaForCausalLM"
        told = "model_type 'mistral' means MistralForCausalLM; Quire goes by architectures"
        assert (told in caplog.text) == warns == bool(caplog.text)

    def test_a_byte_order_mark_is_skipped(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8-sig")
        assert ModelConfig.from_folder(tmp_path) == read(tmp_path, LLAMA)

    def test_no_architecture(self, tmp_path: Path) -> None:
        assert refusal(tmp_path, {"model_type": "t5"}).startswith(
            "FOLDER/config.json: architectures is none (model_type 't5'); supported are "
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden_size": None}, "hidden_size is missing; supported: an integer of at least 1"),
            ({"hidden_size": "64"}, 'hidden_size is "64"; supported: an integer of at least 1'),
            ({"vocab_size": 0}, "vocab_size is 0; supported: an integer of at least 1"),
            ({"vocab_size": True}, "vocab_size is true; supported: an integer of at least 1"),
            ({"rms_norm_eps": 0}, "rms_norm_eps is 0; supported: a positive number"),
            (
                {"num_key_value_heads": 3},
                "num_key_value_heads is 3; supported: a divisor of num_attention_heads 8",
            ),
            (
                {"hidden_act": "relu6"},
                f'hidden_act is "relu6"; supported: {", ".join(DENSE_ACTIVATIONS)}',
            ),
            ({"eos_token_id": "</s>"}, 'eos_token_id is "</s>"; supported: a token id or a list of them'),
            (
                {"quantization_config": {"quant_method": "hqq"}},
                'quantization_config is "hqq"; supported: floats, gptq, awq, compressed-tensors, fp8, bitsandbytes, '
                "torchao, mxfp4",
            ),
        ],
        ids=str,
    )
    def test_values(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        assert refusal(tmp_path, LLAMA | change) == f"FOLDER/config.json: {message}"

    @pytest.mark.parametrize("content", ["{", "", "\x80"])
    def test_corrupt_json(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"config\.json (cannot be read as JSON: |is empty)"):
            ModelConfig.from_folder(tmp_path)

    def test_json_that_is_no_object(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("[]")
        with pytest.raises(CheckpointError, match=r"config\.json holds a JSON list, expected an object"):
            ModelConfig.from_folder(tmp_path)

    def test_no_config_and_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(
            CheckpointError, match=r"config\.json is missing; a Hugging Face checkpoint folder holds one"
        ):
            ModelConfig.from_folder(tmp_path)
        with pytest.raises(CheckpointError, match="nowhere is not a folder"):
            ModelConfig.from_folder(tmp_path / "nowhere")
