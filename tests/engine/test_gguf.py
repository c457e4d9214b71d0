"""A GGUF file through the whole engine: the same text as the checkpoint that it was made from."""

from pathlib import Path

from quire import LLM, SamplingParams
from quire.config import EngineConfig
from quire.engine.memory_plan import plan_memory
from quire.model_config import ModelConfig
from tests.checkpoints import BOS_TOKEN_ID, EOS_TOKEN_ID, make_checkpoint
from tests.gguf_files import tokenizer_metadata, write_gguf

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def write(tmp_path: Path, block: str = "F32") -> tuple[Path, Path]:
    """A checkpoint, and the GGUF file made of it, which lies in a folder of its own."""
    folder = make_checkpoint(tmp_path / "original", "qwen3", intermediate_size=128)
    named = {"tokenizer.ggml.bos_token_id": BOS_TOKEN_ID, "tokenizer.ggml.eos_token_id": EOS_TOKEN_ID}
    (tmp_path / "gguf").mkdir()
    path = write_gguf(
        folder,
        tmp_path / "gguf" / "model.gguf",
        "qwen3",
        block,
        **{**tokenizer_metadata(folder), **named, "tokenizer.chat_template": TEMPLATE},
    )
    return folder, path


def test_text_and_chat_from_a_file_alone(tmp_path: Path) -> None:
    folder, path = write(tmp_path)
    original, model = LLM(str(folder)), LLM(str(path.parent))
    prompts = ["First Citizen:", "once more unto", "a"]
    expected = [output.outputs[0].token_ids for output in original.generate(prompts, GREEDY)]
    assert [output.outputs[0].token_ids for output in model.generate(prompts, GREEDY)] == expected
    (chat,) = model.chat([{"role": "user", "content": "hi"}], GREEDY)
    (text,) = model.generate(["<user>hi"], GREEDY)
    assert chat.outputs[0].token_ids == text.outputs[0].token_ids


def test_the_plan_counts_blocks(tmp_path: Path) -> None:
    _, path = write(tmp_path, "Q4_0")
    config = ModelConfig.from_folder(path)
    plan = plan_memory(EngineConfig(model=str(path)), config, 1 << 30)
    assert plan.weights == config.block_bytes < path.stat().st_size
    anew = plan_memory(EngineConfig(model=str(path), quantization="int8"), config, 1 << 30)
    assert anew.weights == config.spec.weight_bytes(anew.dtype, "int8")
