"""Encoders against transformers: hidden states pooled in every way, ragged batches, windows, pairs and classifiers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from quire import LLM

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 160,
}
ROBERTA = {**SIZES, "max_position_embeddings": 162, "pad_token_id": 1}
DISTILBERT = {
    "vocab_size": 120,
    "dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 80,
    "max_position_embeddings": 160,
}
MODERNBERT = {**SIZES, "num_hidden_layers": 4, "local_attention": 20, "pad_token_id": 0, "reference_compile": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": ROBERTA,
    "XLMRoberta": ROBERTA,
    "Camembert": ROBERTA,
    "DistilBert": DISTILBERT,
    "ModernBert": MODERNBERT,
    "NomicBert": SIZES,
    "Gte": SIZES,
    "JinaEmbeddingsV3": SIZES,
}
LENGTHS = (1, 5, 16, 17, 47, 130, 3, 64)


def make(folder: Path, family: str, ending: str = "Model", **options: Any) -> Any:
    """A random model, saved to `folder`. Weights are large enough that no wrong position hides."""
    torch.manual_seed(len(family))
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], "bos_token_id": 2, **options})
    model = getattr(transformers, f"{family}{ending}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("orm.weight") else 0.0, 0.2)
    model.save_pretrained(folder)
    return model


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    random = np.random.default_rng(7)
    return [random.integers(5, 120, size=length).tolist() for length in lengths]


def hidden_states(model: Any, token_ids: list[int], **inputs: Any) -> NDArray[np.float32]:
    with torch.no_grad():
        found = model(input_ids=torch.tensor([token_ids]), attention_mask=torch.ones(1, len(token_ids)), **inputs)
    return found.last_hidden_state[0].numpy()  # type: ignore[no-any-return]


def cosine(a: Any, b: Any) -> float:
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def embed(llm: LLM, prompts: list[Any], **options: Any) -> list[NDArray[np.float64]]:
    return [np.array(output.outputs.embedding) for output in llm.embed(prompts, use_tqdm=False, **options)]


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_of_hidden_states(family: str, tmp_path: Path) -> None:
    """Several texts share a step, and a step of 170 tokens holds only some of them."""
    model = make(tmp_path, family)
    llm = LLM(str(tmp_path), max_num_batched_tokens=170, max_num_seqs=4)
    prompts = texts()
    for prompt, found in zip(prompts, embed(llm, prompts, normalize=False), strict=True):
        expected = hidden_states(model, prompt).mean(0)
        assert cosine(found, expected) >= 0.9999
        np.testing.assert_allclose(found, expected, atol=2e-4)


POOLINGS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "cls": lambda hidden: hidden[0],
    "last": lambda hidden: hidden[-1],
    "max": lambda hidden: hidden.max(0),
    "mean_sqrt_len": lambda hidden: hidden.sum(0) / len(hidden) ** 0.5,
    "weighted_mean": lambda hidden: np.average(hidden, axis=0, weights=np.arange(1, len(hidden) + 1)),
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings(pooling: str, tmp_path: Path) -> None:
    model = make(tmp_path, "Bert")
    llm = LLM(str(tmp_path), pooling_type=pooling)
    prompts = texts((3, 40, 1, 17))
    for prompt, found in zip(prompts, embed(llm, prompts, normalize=False), strict=True):
        np.testing.assert_allclose(found, POOLINGS[pooling](hidden_states(model, prompt)), atol=2e-4)


def test_token_types_of_a_pair(tmp_path: Path) -> None:
    model = make(tmp_path, "Bert")
    first, second, alone = texts((20, 33, 11))
    pair = {"prompt_token_ids": first + second, "second_text": len(first)}
    types = torch.tensor([[0] * len(first) + [1] * len(second)])
    found, other = embed(LLM(str(tmp_path)), [pair, alone], normalize=False)
    np.testing.assert_allclose(found, hidden_states(model, first + second, token_type_ids=types).mean(0), atol=2e-4)
    np.testing.assert_allclose(other, hidden_states(model, alone).mean(0), atol=2e-4)


CLASSIFIERS = ("Bert", "Roberta", "DistilBert", "ModernBert", "NomicBert", "Gte", "JinaEmbeddingsV3")


@pytest.mark.parametrize("family", CLASSIFIERS)
@pytest.mark.parametrize("num_labels", [1, 3])
def test_classifiers(family: str, num_labels: int, tmp_path: Path) -> None:
    model = make(tmp_path, family, "ForSequenceClassification", num_labels=num_labels)
    llm = LLM(str(tmp_path))
    prompts = texts((9, 33, 2))
    for prompt, found in zip(prompts, llm._vectors(prompts, None, False, False), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0]
        np.testing.assert_allclose(np.array(found.outputs.embedding), logits.numpy(), atol=2e-4)
