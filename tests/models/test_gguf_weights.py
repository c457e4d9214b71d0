"""Models from GGUF files: logits of every family beside transformers', and files that do not fit."""

from pathlib import Path
from typing import Any

import pytest

from quire.errors import CheckpointError
from quire.gguf.file import read_gguf
from quire.kernels.block_matrix import BlockWeight
from quire.layers.linear import Linear
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from tests.checkpoints import make_checkpoint
from tests.gguf_files import write_gguf
from tests.models.parity import assert_close, expected_logits, prompt
from tests.paged_model import PagedModel

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-bias": ("llama", {}),
    "llama-rope-yarn": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32}),
    "gemma3": (
        "gemma3",
        {
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 6,
            "layer_types": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4, "num_hidden_layers": 4}),
    "olmo2": ("olmo2", {}),
    "cohere-qk-norm": ("command-r", {}),
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "layer_types": None}),
    "glm4": ("glm4", {}),
    "mixtral": ("llama", {}),
    "qwen2-moe": ("qwen2moe", {"mlp_only_layers": []}),
    "qwen3-next": ("qwen3next", {"mlp_only_layers": []}),
    "phi3": ("phi3", {}),
    "granite-moe": ("granitemoe", {}),
    "phimoe": ("phimoe", {"router_jitter_noise": 0.01}),  # the published models'; the file does not say
    "gpt-oss": ("gpt-oss", {}),
    "deepseek-v2": (
        "deepseek2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 0.9,  # the file has one number for both
                "mscale_all_dim": 0.9,
            }
        },
    ),
    "deepseek-v3": ("deepseek2", {}),
    "stablelm-parallel": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "gpt2": ("gpt2", {}),
    "gpt-neox": ("gptneox", {}),
    "phi": ("phi2", {}),
    "falcon": ("falcon", {}),
    "falcon-new": ("falcon", {}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {}),
}
METADATA: dict[str, dict[str, Any]] = {"gemma3": {"rope__freq_base": 5000.0, "rope__freq_base_swa": 300.0}}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    arch, overrides = FAMILIES[family]
    folder = make_checkpoint(tmp_path, family, **overrides)
    path = write_gguf(folder, tmp_path / "model.gguf", arch, **METADATA.get(family, {}))
    ids = prompt(40)
    assert_close(PagedModel(path).step({0: ids})[0], expected_logits(folder, ids))


@pytest.mark.parametrize("block", ["Q8_0", "Q5_1", "Q4_0", "BF16"])
def test_blocks_compute_what_their_numbers_do(block: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3", intermediate_size=128)
    stored = write_gguf(folder, tmp_path / "blocks.gguf", "qwen3", block)
    widened = write_gguf(folder, tmp_path / "floats.gguf", "qwen3", block, widened=True)
    ids = prompt(40)
    found, expected = PagedModel(stored), PagedModel(widened)
    logits, expected_logits = found.step({0: ids})[0], expected.step({0: ids})[0]
    # Inputs of blocks of four and five bits are rounded to 8 bits, others to 15.
    tolerance = 2e-3 if block in ("Q8_0", "BF16") else 0.3
    assert_close(logits, expected_logits, tolerance)
    assert (logits - expected_logits).norm() <= 0.2 * tolerance * expected_logits.norm()
    best = expected_logits.gather(1, logits.argmax(-1, keepdim=True))
    assert (expected_logits.amax(1, keepdim=True) - best).max() <= tolerance, "only near-ties may fall otherwise"
    config = ModelConfig.from_folder(stored)
    assert (config.block_bytes > 0) == (block != "BF16")
    if config.block_bytes:
        head: Linear = found.model.head  # type: ignore[attr-defined]
        assert head.packed.nbytes == sum(
            each.end - each.begin for name, each in read_gguf(stored).tensors.items() if name == "token_embd.weight"
        )


def test_a_quantisation_stores_blocks_anew(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", intermediate_size=128)
    path = write_gguf(folder, tmp_path / "m.gguf", "llama", "Q8_0")
    ids = prompt(30)
    found, expected = PagedModel(path, "int8").step({0: ids})[0], PagedModel(path).step({0: ids})[0]
    assert 0 < (found - expected).abs().max() < 0.2 * expected.abs().max()


def test_experts_keep_their_blocks(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mixtral", intermediate_size=128)
    stored = write_gguf(folder, tmp_path / "blocks.gguf", "llama", "Q8_0")
    widened = write_gguf(folder, tmp_path / "floats.gguf", "llama", "Q8_0", widened=True)
    ids = prompt(30)
    model = PagedModel(stored)
    assert_close(model.step({0: ids})[0], PagedModel(widened).step({0: ids})[0], 2e-3)
    packed = model.model.layers[0].mlp.experts.packed  # type: ignore[attr-defined]
    assert isinstance(packed.gate_up, BlockWeight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block_count": 4}, "tensor model.layers.3.input_layernorm.weight of shape .* is missing"),
        ({"block_count": 2}, "tensors are not part of the LlamaForCausalLM"),
        ({"feed_forward_length": 96}, r"tensor blk.0.ffn_gate.weight has shape \[112, 64\], expected \[96, 64\]"),
    ],
)
def test_files_that_do_not_fit_their_metadata(change: dict[str, int], said: str, tmp_path: Path) -> None:
    path = write_gguf(make_checkpoint(tmp_path, "llama"), tmp_path / "m.gguf", "llama", **change)
    with pytest.raises(CheckpointError, match=said):
        PagedModel(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"embedding_length": 32}, "llama.embedding_length is 32; supported: 64"),
        ({"attention__head_count": 0}, "llama.attention.head_count is 0; supported: an integer from 1"),
        ({"attention__value_length": 16}, "llama.attention.value_length is 16; supported: 32"),
        ({"rope__dimension_count": 33}, "llama.rope.dimension_count is 33; supported: an even number"),
        ({"rope__scaling__type": "new", "rope__scaling__factor": 2.0}, "llama.rope.scaling.type is 'new'; supported"),
        ({"context_length": "long"}, "llama.context_length is 'long'; supported: an integer"),
    ],
)
def test_metadata_that_mean_no_model(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write_gguf(make_checkpoint(tmp_path, "llama"), tmp_path / "m.gguf", "llama", **change)
    with pytest.raises(CheckpointError, match=said):
        ModelConfig.from_folder(path)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = write_gguf(make_checkpoint(tmp_path, "llama"), tmp_path / "m.gguf", "llama")
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    with pytest.raises(CheckpointError, match=r"general.architecture is mamba; supported: llama, qwen2"):
        open_checkpoint(path)
