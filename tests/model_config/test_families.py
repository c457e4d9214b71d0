"""What families say as data: config.json as transformers writes it, read into fields and parameter counts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from quire.errors import CheckpointError
from quire.layer_spec import ExpertsSpec, LayerSpec
from quire.model_config import ARCHITECTURES, ModelConfig
from quire.model_config.alibi import alibi_slopes
from quire.model_config.decoder_layers import decoder_layers

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        "LlamaForCausalLM",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "Llama with biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2}),
    "Mistral-7B": ("MistralForCausalLM", {"num_hidden_layers": 32}),
    "Qwen2-0.5B": (
        "Qwen2ForCausalLM",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-8B": ("Qwen3ForCausalLM", {"num_hidden_layers": 36, "num_key_value_heads": 8}),
    "GPT-2": ("GPT2LMHeadModel", {}),
    "Mixtral-8x7B": ("MixtralForCausalLM", {}),
    "stablelm-3b": ("StableLmForCausalLM", {}),
    "stablelm-2-1.6b": (
        "StableLmForCausalLM",
        {
            "vocab_size": 100352,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "use_qkv_bias": True,
        },
    ),
    "stablelm-2-12b": (
        "StableLmForCausalLM",
        {
            "vocab_size": 100352,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "qk_layernorm": True,
            "use_parallel_residual": True,
        },
    ),
    "gemma-2-2b": ("Gemma2ForCausalLM", {}),
    "starcoder2-3b": (
        "Starcoder2ForCausalLM",
        {"num_hidden_layers": 30, "max_position_embeddings": 16384, "sliding_window": 4096},
    ),
    "starcoder2-7b": (
        "Starcoder2ForCausalLM",
        {"hidden_size": 4608, "intermediate_size": 18432, "num_hidden_layers": 32}
        | {"num_attention_heads": 36, "num_key_value_heads": 4},
    ),
    "starcoder2-15b": (
        "Starcoder2ForCausalLM",
        {"hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 40}
        | {"num_attention_heads": 48, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "starcoder": (
        "GPTBigCodeForCausalLM",
        {"vocab_size": 49152, "n_embd": 6144, "n_layer": 40, "n_head": 48, "n_inner": 24576}
        | {"n_positions": 8192, "activation_function": "gelu"},
    ),
    "santacoder with a KV head for each query head": (
        "GPTBigCodeForCausalLM",
        {"vocab_size": 49280, "n_embd": 2048, "n_layer": 24, "n_head": 16, "n_positions": 2048, "multi_query": False},
    ),
    "gpt-j-6b": ("GPTJForCausalLM", {}),
    "bloom-560m": ("BloomForCausalLM", {"hidden_size": 1024, "n_layer": 24, "n_head": 16}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 14336, "n_layer": 70, "n_head": 112}),
    "gpt-neox-20b": ("GPTNeoXForCausalLM", {"hidden_act": "gelu_fast"}),
    "pythia-1.4b": (
        "GPTNeoXForCausalLM",
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    ),
    "falcon-7b": ("FalconForCausalLM", {}),
    "falcon-40b": (
        "FalconForCausalLM",
        {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8}
        | {"new_decoder_architecture": True},
    ),
    "falcon-11b": (
        "FalconForCausalLM",
        {"hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32, "num_kv_heads": 8}
        | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "max_position_embeddings": 8192}
        | {"rope_theta": 500042.0, "tie_word_embeddings": False},
    ),
    "falcon-rw-1b": (
        "FalconForCausalLM",
        {"vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "alibi": True}
        | {"bias": True, "multi_query": False, "parallel_attn": False},
    ),
    "mpt-7b": (
        "MptForCausalLM",
        {"vocab_size": 50432, "d_model": 4096, "n_layers": 32, "n_heads": 32, "max_seq_len": 2048},
    ),
    "mpt-7b-storywriter": (
        "MptForCausalLM",
        {"vocab_size": 50432, "d_model": 4096, "n_layers": 32, "n_heads": 32, "max_seq_len": 65536}
        | {"attn_config": {"alibi_bias_max": 16, "clip_qkv": 6.0, "attn_impl": "triton"}},
    ),
    "mpt-30b": (
        "MptForCausalLM",
        {"vocab_size": 50432, "d_model": 7168, "n_layers": 48, "n_heads": 64, "max_seq_len": 8192},
    ),
}
"""Name → architecture, and what its config changes of transformers' defaults."""
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GPT2LMHeadModel": "gpt2",
    "MixtralForCausalLM": "mixtral",
    "StableLmForCausalLM": "stablelm",
    "Gemma2ForCausalLM": "gemma2",
    "Starcoder2ForCausalLM": "starcoder2",
    "GPTBigCodeForCausalLM": "gpt_bigcode",
    "GPTJForCausalLM": "gptj",
    "BloomForCausalLM": "bloom",
    "FalconForCausalLM": "falcon",
    "MptForCausalLM": "mpt",
    "GPTNeoXForCausalLM": "gpt_neox",
}


def write(folder: Path, name: str, **changes: Any) -> PretrainedConfig:
    """Save the config of a published model as transformers does."""
    architecture, options = PUBLISHED[name]
    config = AutoConfig.for_model(MODEL_TYPES[architecture], **options, **changes)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return config


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    config = write(tmp_path, name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    spec = ModelConfig.from_folder(tmp_path).spec
    assert spec.num_parameters == model.num_parameters()
    vectors = sum(each.numel() for each in model.parameters() if each.dim() == 1)
    assert spec.num_vector_parameters == vectors


def test_mixtral_is_read(tmp_path: Path) -> None:
    write(tmp_path, "Mixtral-8x7B")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_experts, config.num_experts_per_token, config.expert_intermediate_size) == (8, 2, 14336)
    assert config.norm_topk
    assert config.shared_expert_intermediate_size == 0
    assert config.rope is not None
    assert config.rope.theta == 1e6
    assert config.layer_windows == (0,) * 32
    spec = config.spec
    # As its announcement says: 46.7B parameters, 12.9B of them used for a token.
    assert (spec.num_parameters, spec.num_active_parameters) == (46_702_792_704, 12_879_925_248)
    assert isinstance(spec.layers[0].mlp, ExpertsSpec)
    assert [linear.name for linear, _ in spec.layers[0].matrices] == [
        *("qkv", "o", "router"),
        *("expert.gate_up", "expert.down"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; supported: at most the number of experts 8"),
        ({"num_local_experts": -1}, "num_local_experts is -1; supported: an integer of at least 1"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is missing; supported: an integer of at least 1"),
    ],
)
def test_experts_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "Mixtral-8x7B")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)


def test_stablelm_is_read(tmp_path: Path) -> None:
    write(tmp_path, "stablelm-2-12b")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.norm, config.norm_bias, config.norm_eps) == ("layer_norm", True, 1e-5)
    assert (config.qk_norm, config.qk_norm_per_head, config.parallel_residual) == (True, True, True)
    assert (config.qkv_bias, config.o_bias) == (False, False)
    assert config.rope is not None
    assert (config.rope.rotary_dim(config.head_dim), config.rope.layout) == (40, "half")
    write(tmp_path, "stablelm-2-1.6b")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.qkv_bias, config.o_bias, config.qk_norm, config.parallel_residual) == (True, False, False, False)
    # Versions before 5 wrote rope_theta and the share that is rotated beside each other.
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"]
    path.write_text(json.dumps(values | {"rope_theta": 5000, "partial_rotary_factor": 0.5}))
    rope = ModelConfig.from_folder(tmp_path).rope
    assert rope is not None
    assert (rope.theta, rope.partial_rotary_factor) == (5000, 0.5)


def test_gemma_2_is_read(tmp_path: Path) -> None:
    write(tmp_path, "gemma-2-2b", num_hidden_layers=4, sliding_window=9, query_pre_attn_scalar=144)
    config = ModelConfig.from_folder(tmp_path)
    assert config.activation == "gelu_tanh"
    assert (config.norm, config.norm_bias, config.norm_unit_offset, config.post_norms) == (
        "rms_norm",
        False,
        True,
        True,
    )
    assert config.attention_scale == 1 / 12
    assert (config.attention_softcap, config.logits_softcap) == (50.0, 30.0)
    assert config.embedding_multiplier == 2304**0.5
    assert config.tie_word_embeddings
    assert config.layer_windows == (9, 0, 9, 0)
    assert [layer.attention.kv.kind for layer in config.spec.layers] == ["window", "full"] * 2
    assert config.spec.layers[0].attention.kv.window == 9
    # Older files leave the types of layers to the code, and may switch a cap off.
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["layer_types"]
    path.write_text(json.dumps(values | {"attn_logit_softcapping": None}))
    assert ModelConfig.from_folder(tmp_path).layer_windows == (9, 0, 9, 0)
    assert ModelConfig.from_folder(tmp_path).attention_softcap == 0
    path.write_text(json.dumps(values | {"use_bidirectional_attention": True}))
    with pytest.raises(CheckpointError, match="use_bidirectional_attention is true"):
        ModelConfig.from_folder(tmp_path)


def test_starcoder2_is_read(tmp_path: Path) -> None:
    write(tmp_path, "starcoder2-3b")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.norm, config.norm_bias, config.norm_eps) == ("layer_norm", True, 1e-5)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.gated_mlp) == (True, True, True, False)
    assert config.activation == "gelu_tanh"
    assert config.layer_windows == (4096,) * 30
    assert config.spec.num_parameters == 3_030_371_328
    write(tmp_path, "starcoder2-7b")
    assert ModelConfig.from_folder(tmp_path).layer_windows == (0,) * 32


def test_gpt_bigcode_is_read(tmp_path: Path) -> None:
    write(tmp_path, "starcoder")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_heads, config.num_kv_heads, config.num_qkv_heads, config.head_dim) == (48, 1, 50, 128)
    assert (config.activation, config.rope, config.tie_word_embeddings) == ("gelu", None, True)
    write(tmp_path, "santacoder with a KV head for each query head")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_heads, config.num_kv_heads, config.activation) == (16, 16, "gelu_tanh")


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 8, 12, 16, 25, 32, 71, 112, 128])
def test_slopes_of_alibi(num_heads: int) -> None:
    bloom = _get_alibi_slopes(num_heads, torch.device("cpu"))
    torch.testing.assert_close(torch.tensor(alibi_slopes(num_heads)), bloom, rtol=2e-6, atol=0)


def test_bloom_is_read_as_published(tmp_path: Path) -> None:
    write(tmp_path, "bloom-560m")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.context_length, config.rope, config.spec.positions) == (2048, None, None)
    assert (config.activation, config.embedding_norm, config.tie_word_embeddings) == ("gelu_tanh", True, True)
    assert config.alibi_slopes[:2] == (2**-0.5, 0.5)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    published = {"n_embed": values.pop("hidden_size"), "num_attention_heads": values.pop("n_head"), "n_inner": None}
    path.write_text(json.dumps(values | published))
    assert ModelConfig.from_folder(tmp_path) == config
    path.write_text(json.dumps({**values, "num_attention_heads": 16}))
    with pytest.raises(CheckpointError, match="hidden_size is missing; supported: an integer of at least 1"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "kv_heads", "parallel", "two_norms", "biases", "alibi"),
    [
        ("falcon-7b", 1, True, False, False, False),
        ("falcon-40b", 8, True, True, False, False),
        ("falcon-11b", 8, True, False, False, False),
        ("falcon-rw-1b", 32, False, False, True, True),
    ],
)
def test_falcon_is_read(
    name: str, kv_heads: int, parallel: bool, two_norms: bool, biases: bool, alibi: bool, tmp_path: Path
) -> None:
    write(tmp_path, name)
    config = ModelConfig.from_folder(tmp_path)
    assert (config.num_kv_heads, config.parallel_residual, config.parallel_mlp_norm) == (kv_heads, parallel, two_norms)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (biases,) * 3
    assert (bool(config.alibi_slopes), config.rope is None) == (alibi, alibi)
    # 2 ** -0.25 in bfloat16, and its eighth, since a head has 64 elements.
    assert not alibi or config.alibi_slopes[0] == 0.83984375 / 8


def test_falcon_s_number_of_norms(tmp_path: Path) -> None:
    write(tmp_path, "falcon-40b")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_ln_in_parallel_attn": 3}))
    with pytest.raises(CheckpointError, match="num_ln_in_parallel_attn is 3; supported: 1 or 2"):
        ModelConfig.from_folder(tmp_path)


def test_mpt_is_read(tmp_path: Path) -> None:
    write(tmp_path, "mpt-7b-storywriter")
    config = ModelConfig.from_folder(tmp_path)
    assert (config.norm, config.norm_bias, config.qkv_bias, config.mlp_bias) == ("layer_norm", False, False, False)
    assert (config.context_length, config.clip_qkv, config.activation) == (65536, 6.0, "gelu")
    assert config.alibi_slopes[:2] == (2**-0.5, 2**-1)
    # Published files name the class of their own code, and leave most keys out.
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    kept = ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len", "attn_config", "learned_pos_emb")
    path.write_text(json.dumps({key: values[key] for key in kept} | {"architectures": ["MPTForCausalLM"]}))
    assert ModelConfig.from_folder(tmp_path) == replace(
        config, architecture="MPTForCausalLM", checkpoint_dtype=ModelConfig.from_folder(tmp_path).checkpoint_dtype
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"no_bias": False}, "no_bias is false; supported: true"),
        ({"expansion_ratio": 3}, "expansion_ratio is 3; supported: 4"),
        ({"logit_scale": "inv_sqrt_d_model"}, 'logit_scale is "inv_sqrt_d_model"; supported: null'),
        ({"attn_config": {"alibi": False}}, "attn_config.alibi is false; supported: true"),
        ({"attn_config": {"qk_ln": True}}, "attn_config.qk_ln is true; supported: false"),
        ({"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm is true; supported: false"),
        ({"attn_config": {"softmax_scale": 0.1}}, "attn_config.softmax_scale is 0.1; supported: null"),
        (
            {"attn_config": {"attn_type": "multiquery_attention"}},
            'attn_config.attn_type is "multiquery_attention"; supported: "multihead_attention"',
        ),
        ({"attn_config": {"clip_qkv": -1}}, "attn_config.clip_qkv is -1; supported: a positive number"),
    ],
    ids=str,
)
def test_options_of_mpt_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "mpt-7b")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)


def test_llama_s_fields_are_the_defaults(tmp_path: Path) -> None:
    write(tmp_path, "Llama-3.1-8B")
    config = ModelConfig.from_folder(tmp_path)
    assert config.attention_scale == 128**-0.5
    names = ("norm", "norm_unit_offset", "post_norms", "parallel_residual", "num_experts", "expert_intermediate_size")
    assert [getattr(config, name) for name in names] == ["rms_norm", False, False, False, 0, 0]
    assert (config.attention_softcap, config.logits_softcap, config.embedding_multiplier) == (0.0, 0.0, 1.0)


def two_dense_layers_first(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """Layers of a made-up family: the first two have an MLP, the others experts."""
    dense = replace(config, num_experts=0)
    return decoder_layers(dense)[:2] + decoder_layers(config)[2:]


def test_a_row_can_name_its_own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(ARCHITECTURES["MixtralForCausalLM"], layers=f"{__name__}:two_dense_layers_first")
    monkeypatch.setitem(ARCHITECTURES, "ToyForCausalLM", row)
    write(tmp_path, "Mixtral-8x7B", num_hidden_layers=5)
    config = ModelConfig.from_folder(tmp_path)
    toy = replace(config, architecture="ToyForCausalLM")
    assert [layer.experts is None for layer in toy.spec.layers] == [True, True, False, False, False]
    fewer = 2 * (7 * 3 * 4096 * 14336 + 8 * 4096)  # the other experts, and the router
    assert config.spec.num_parameters - toy.spec.num_parameters == fewer
