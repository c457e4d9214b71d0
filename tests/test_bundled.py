"""The bundled model: complete, small, a checkpoint like any other, as good as TRAINING.md says, and writing verse."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from quire.engine.chat_template import ChatTemplate
from quire.engine.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[1] / "src" / "quire" / "bundled"
HELD_OUT = Path(__file__).parent / "data" / "held_out.txt"
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "TRAINING.md",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(FOLDER)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    loaded, info = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps this small lose time to a second thread
    yield loaded.eval()
    torch.set_num_threads(num_threads)


@pytest.fixture
def write(model: Any) -> Any:
    """Prompt ids → sampled continuations."""

    def write(prompt: list[int], num_tokens: int, seed: int, samples: int = 1) -> list[list[int]]:
        torch.manual_seed(seed)
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            num_return_sequences=samples,
            do_sample=True,
            temperature=0.7,
            pad_token_id=model.config.eos_token_id,
        )
        return [row[len(prompt) :].tolist() for row in output]

    return write


def recorded(label: str) -> float:
    """The number that TRAINING.md's table has under `label`."""
    match = re.search(rf"^\| {re.escape(label)} \| ([\d.]+)", (FOLDER / "TRAINING.md").read_text(), re.MULTILINE)
    assert match, label
    return float(match[1])


def test_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == FILES
    assert sum(files.values()) < 8_000_000


def test_weights_have_16_bits() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


def test_configuration_agrees_with_the_tokenizer(tokenizer: Tokenizer) -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == tokenizer.vocab_size
    assert config["bos_token_id"] == tokenizer.bos_token_id
    assert generation["eos_token_id"] == [tokenizer.eos_token_id]
    assert config["max_position_embeddings"] >= 1024


def test_tokenizer_equals_transformers(tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(FOLDER)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What news, 你好? 🙂"},
    ]
    text = ChatTemplate.from_folder(FOLDER).render(messages)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|system|>Be brief.<|end|><|user|>What news, 你好? 🙂<|end|><|assistant|>"
    for sample in (text, HELD_OUT.read_text()):
        ids = tokenizer.encode(sample)
        assert ids == theirs(sample)["input_ids"]
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@torch.no_grad()
def test_held_out_loss_is_as_recorded(model: Any, tokenizer: Tokenizer) -> None:
    """Rows of the longest context, each opened by <|begin|>, as scripts/train_bundled_model.py measures."""
    text = HELD_OUT.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    total = 0.0
    for row in ids.split(model.config.max_position_embeddings):
        begin = torch.tensor([tokenizer.bos_token_id])
        logits = model(torch.cat((begin, row[:-1]))[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, row, reduction="sum").item()
    nats = total / len(text.encode())
    assert nats == pytest.approx(recorded(f"of its first {len(text):,} characters"), abs=2e-3)
    assert recorded("held-out loss") / math.log(2) < 2.3  # bits; gzip needs over 3


def test_writes_what_reads_like_verse(tokenizer: Tokenizer, write: Any) -> None:
    passages = [tokenizer.decode(ids) for ids in write(tokenizer.encode("KING HENRY:\n"), 200, seed=0, samples=4)]
    text = "\n".join(passages)
    lines = [line for line in text.splitlines() if line]
    speakers = [line for line in lines if re.fullmatch(r"[A-Z][A-Za-z ]+:", line)]
    verse = [line for line in lines if line not in speakers]
    assert len(speakers) >= 2
    assert sum(line[0].isupper() for line in verse) > 0.8 * len(verse)
    assert 25 < sum(map(len, verse)) / len(verse) < 60
    known = set(re.findall(r"[a-z']+", HELD_OUT.read_text().lower()))
    words = re.findall(r"[a-z']+", text.lower())
    assert sum(word in known for word in words) > 0.6 * len(words)


def test_answers_in_a_chat_and_stops(tokenizer: Tokenizer, write: Any) -> None:
    template = ChatTemplate.from_folder(FOLDER)
    for cue in ("What is love?", "ROMEO:"):
        prompt = tokenizer.encode(template.render([{"role": "user", "content": cue}]), add_special_tokens=False)
        (ids,) = write(prompt, 400, seed=0)
        assert ids[-1] == tokenizer.eos_token_id
        assert re.match(r"[A-Z][A-Za-z ]+:\n\S", tokenizer.decode(ids))
