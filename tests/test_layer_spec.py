"""Sums over the layers of small models, worked out by hand."""

from dataclasses import replace

import pytest

from quire.layer_spec import ExpertsSpec, KVSpec, LinearSpec
from quire.model_config import ModelConfig, RopeConfig

LLAMA = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=160,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    rope=RopeConfig(),
)
EXPERTS = replace(LLAMA, num_experts=8, num_experts_per_token=2, expert_intermediate_size=96)
SHARED = replace(EXPERTS, shared_expert_intermediate_size=32)


def test_numbers_of_a_small_model() -> None:
    spec = LLAMA.spec
    attention = 64 * 64 * 2 + 64 * 16 * 2
    matrices = 4 * (attention + 3 * 64 * 160) + 2 * 1000 * 64
    vectors = 4 * 2 * 64 + 64
    assert spec.num_parameters == spec.num_active_parameters == matrices + vectors
    assert spec.weight_bytes("float32") == 4 * (matrices + vectors)
    assert spec.weight_bytes("bfloat16") == 2 * matrices + 4 * vectors
    assert spec.kv_bytes_per_token("float32") == 2 * 4 * 2 * 8 * 4
    assert spec.kv_bytes_per_token("float16") == 2 * 4 * 2 * 8 * 2
    assert spec.kv_bytes_per_token("int8") == 2 * 4 * 2 * (8 + 4)
    assert spec.largest_matrix == 64 * 1000
    assert replace(LLAMA, vocab_size=100).spec.largest_matrix == 64 * 320
    assert spec.operations_per_pair == 4 * 4 * 8 * 8  # layers; score and value, each a product and a sum; heads


def test_a_tied_table_is_held_once() -> None:
    untied, tied = LLAMA.spec, replace(LLAMA, tie_word_embeddings=True).spec
    assert tied.num_parameters == untied.num_parameters - 1000 * 64
    for stored_as in (("float32", None), ("float32", "int8")):
        assert tied.weight_bytes(*stored_as) == untied.weight_bytes(*stored_as) - 1000 * 64 * 4


def test_learned_positions_are_a_table() -> None:
    learned = replace(LLAMA, rope=None).spec
    assert learned.num_parameters == LLAMA.spec.num_parameters + 512 * 64
    assert learned.weight_bytes("float16", "int4") == LLAMA.spec.weight_bytes("float16", "int4") + 512 * 64 * 2


def test_activations_grow_with_tokens_and_logits() -> None:
    spec = LLAMA.spec
    assert spec.activation_bytes(10, 0) == 10 * spec.activation_bytes(1, 0)
    assert spec.activation_bytes(10, 5) - spec.activation_bytes(10, 0) == 5 * 4 * (2 * 1000 + 64)
    # The widest moment of a layer: residual, its norm, gate and up, their product.
    assert spec.activation_bytes(1, 0) >= 4 * (2 * 64 + 3 * 160)


def test_memory_holds_all_experts_and_a_token_passes_some() -> None:
    spec = EXPERTS.spec
    expert = 3 * 64 * 96
    attention = 64 * 64 * 2 + 64 * 16 * 2
    assert spec.layer_parameters == 4 * (attention + 8 * 64 + 8 * expert)
    assert spec.active_layer_parameters == 4 * (attention + 8 * 64 + 2 * expert)
    assert spec.num_parameters - spec.num_active_parameters == 4 * 6 * expert
    # Residual, norm and update; router's logits; of each active expert its input, gate, up, product and output.
    assert spec.activation_bytes(1, 0) == 4 * (3 * 64 + 8 + 2 * (64 + 3 * 96 + 64))


def test_a_shared_expert_is_always_passed() -> None:
    shared = 3 * 64 * 32
    for name in ("num_parameters", "num_active_parameters", "active_layer_parameters"):
        assert getattr(SHARED.spec, name) - getattr(EXPERTS.spec, name) == 4 * shared
    assert SHARED.spec.activation_bytes(1, 0) - EXPERTS.spec.activation_bytes(1, 0) == 4 * 3 * 32


def test_a_quantisation_leaves_the_router_in_float32() -> None:
    experts = EXPERTS.spec.layers[0].mlp
    assert isinstance(experts, ExpertsSpec)
    assert not experts.router.quantizes
    # int8 takes a byte for each input and 2 for the scale of every 64 of an output; qkv has 96 outputs.
    attention, expert = 96 * (64 + 2) + 64 * (64 + 2), 2 * 96 * (64 + 2) + 64 * (96 + 2 * 2)
    layer = attention + 8 * 64 * 4 + 8 * expert
    assert EXPERTS.spec.layer_bytes("bfloat16", "int8") == 4 * layer
    assert EXPERTS.spec.layer_bytes("bfloat16") == 2 * EXPERTS.spec.layer_parameters


@pytest.mark.parametrize(("key_dim", "value_dim"), [(8, 8), (24, 16)])
def test_keys_and_values_may_differ_in_width(key_dim: int, value_dim: int) -> None:
    kv = KVSpec(num_heads=2, key_dim=key_dim, value_dim=value_dim)
    assert kv.bytes_per_token("float16") == 2 * (key_dim + value_dim) * 2
    assert kv.bytes_per_token("int8") == 2 * (key_dim + value_dim + 2 * 4)


def test_weight_bytes_of_one_layer() -> None:
    linear = LinearSpec("o", 10, 64)
    assert (linear.num_parameters, linear.weight_bytes("float16")) == (640, 1280)
