"""A model whose layers lie on several ranks computes the very numbers of one process, in every family."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.errors import CheckpointError, ConfigError
from quire.kv_groups import KVLayout
from quire.layers.pipe import Pipe
from quire.layers.ranks import Ranks
from quire.model_config import ModelConfig
from quire.model_config.divided import divide, kv_copies
from quire.model_config.stages import layer_counts, take_stage
from quire.models.shards import Shards
from tests.checkpoints import make_checkpoint
from tests.gguf_files import write_gguf
from tests.models.test_shards import CPU, logits_of, run_together
from tests.paged_model import PagedModel

KINDS = (
    *("llama", "llama-bias", "gpt2", "gpt-bigcode", "mixtral", "qwen2-moe", "gemma2", "deepseek-v3", "gpt-oss"),
    *("olmo2", "falcon-rw", "bloom", "cohere", "opt", "phi3", "stablelm-parallel"),
)
"""Every way of beginning, of ending, and of passing the residual stream from layer to layer."""
SIX_LAYERS = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}


def staged_logits(folder: Path, size: int, scratch: Path, dtype: str = "float32") -> Tensor:
    """The logits that the last of `size` stages computes."""
    whole = ModelConfig.from_folder(folder)

    def work(ranks: Ranks) -> Tensor:
        part = take_stage(whole, size, ranks.rank)
        assert part.stage is not None
        pipe = Pipe(part.stage, part.hidden_size, torch.float32)
        pipe.connect(scratch / f"stages-{size}", CPU)
        return logits_of(PagedModel(folder, dtype, config=part, pipe=pipe))

    return run_together(size, work, scratch)[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_stages_compute_the_bits_of_one_process(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", kind)
    assert torch.equal(staged_logits(folder, 2, tmp_path), logits_of(PagedModel(folder)))


def test_three_stages_of_a_recurrent_model(tmp_path: Path) -> None:
    kinds = ["linear_attention", "full_attention"] * 3
    folder = make_checkpoint(tmp_path / "model", "qwen3-next", num_hidden_layers=6, layer_types=kinds)
    assert torch.equal(staged_logits(folder, 3, tmp_path), logits_of(PagedModel(folder)))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_layers_keep_their_bits(dtype: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "mixtral", intermediate_size=128, tie_word_embeddings=True)
    assert torch.equal(staged_logits(folder, 2, tmp_path, dtype), logits_of(PagedModel(folder, dtype)))


def test_stages_of_divided_layers(tmp_path: Path) -> None:
    """Two stages of two ranks each."""
    folder = make_checkpoint(tmp_path / "model", "llama")
    whole = ModelConfig.from_folder(folder)

    def work(ranks: Ranks) -> Tensor:
        place, rank = divmod(ranks.rank, 2)
        part = take_stage(divide(whole, 2, rank), 2, place)
        assert part.stage is not None
        own = Ranks(rank, 2)
        own.connect(tmp_path / f"stage-{place}", CPU)
        pipe = Pipe(part.stage, part.hidden_size, torch.float32)
        pipe.connect(tmp_path / f"line-{rank}", CPU)
        shards = Shards(own, kv_copies(whole, 2), whole.vocab_size)
        return logits_of(PagedModel(folder, config=part, shards=shards, pipe=pipe))

    *_, third, fourth = run_together(4, work, tmp_path)
    assert torch.equal(third, fourth)
    torch.testing.assert_close(third, logits_of(PagedModel(folder)), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("block", ["Q8_0", "F32"])
def test_stages_of_a_gguf_file(block: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen3", intermediate_size=128, tie_word_embeddings=True)
    path = write_gguf(folder, tmp_path / "model.gguf", "qwen3", block)
    assert torch.equal(staged_logits(path, 2, tmp_path), logits_of(PagedModel(path)))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("name", ["model.layers.{own}.self_attn.extra", "model.layers.4.mlp.up_proj.weight"])
def test_tensors_that_nobody_takes_are_refused_by_some_stage(name: str, index: int, tmp_path: Path) -> None:
    """A tensor among a stage's own layers by that stage, one behind the last layer by the last stage."""
    folder = make_checkpoint(tmp_path, "llama", num_hidden_layers=4)
    whole = ModelConfig.from_folder(folder)
    part = take_stage(whole, 3, index)
    assert part.stage is not None
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name.format(own=part.first_layer): torch.zeros(2)}, folder / "model.safetensors")
    pipe = Pipe(part.stage, part.hidden_size, torch.float32)
    if "own" in name or index == 2:
        with pytest.raises(CheckpointError, match="1 tensors are not part of the model"):
            PagedModel(folder, config=part, pipe=pipe)
    else:
        PagedModel(folder, config=part, pipe=pipe)


@pytest.mark.parametrize(
    ("kind", "size", "reason"),
    [
        ("llama", 4, "too many for the 3 layers of LlamaForCausalLM: each rank needs one layer at least"),
        ("qwen3-next", 2, "each rank needs one recurrent layer at least|each rank needs one attention layer at least"),
        ("opt-350m", 2, "OPTForCausalLM has norms that follow the additions, which Quire cannot cut into stages"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(kind: str, size: int, reason: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, kind)
    with pytest.raises(ConfigError, match=f"pipeline_parallel_size is {size}.*({reason})"):
        take_stage(ModelConfig.from_folder(folder), size, 0)


def test_layers_of_each_stage_are_those_of_vllm() -> None:
    assert [layer_counts(*case) for case in ((32, 2), (30, 4), (5, 3), (2, 2))] == [
        [16, 16],
        [7, 8, 8, 7],
        [2, 2, 1],
        [1, 1],
    ]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_stages_are_counted_as_they_are_held(size: int, tied: bool, tmp_path: Path) -> None:
    whole = ModelConfig.from_folder(make_checkpoint(tmp_path, "gemma3", **SIX_LAYERS, tie_word_embeddings=tied))
    stages = [take_stage(whole, size, index) for index in range(size)]
    again = whole.vocab_size * whole.hidden_size * 4 if tied else 0
    held = sum(stage.spec.weight_bytes("float32") for stage in stages)
    assert held == whole.spec.weight_bytes("float32") + again, "a tied table is on the first and on the last"
    kv = sum(stage.spec.kv_bytes_per_token("float32") for stage in stages)
    assert kv == whole.spec.kv_bytes_per_token("float32")
    layouts = [KVLayout.of(stage.spec) for stage in stages]
    assert len({layout.windows for layout in layouts}) == 1, "one scheduler plans for all"
    held_layers = [sum(len(group.layers) for group in layout.groups) for layout in layouts]
    assert held_layers == [stage.num_layers for stage in stages]
    assert max(layout.layers_per_block for layout in layouts) < KVLayout.of(whole.spec).layers_per_block
