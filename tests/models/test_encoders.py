"""Encoders against transformers: hidden states pooled in every way, ragged batches, windows, pairs and classifiers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file

from quire import LLM
from quire.errors import CheckpointError

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
    "MPNet": ROBERTA,
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
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES.get(family, {}), "bos_token_id": 2, **options})
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


CLASSIFIERS = ("Bert", "Roberta", "MPNet", "DistilBert", "ModernBert", "NomicBert", "Gte", "JinaEmbeddingsV3")


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


def test_distances_beyond_all_buckets(tmp_path: Path) -> None:
    """Distances from 128 on share a bucket, and a long text is computed in runs of queries."""
    model = make(tmp_path, "MPNet", max_position_embeddings=402)
    prompts = texts((390, 7, 200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quire.layers.text_attention._MAX_SCORES", 4 * 390 * 100)
        found = embed(LLM(str(tmp_path)), prompts, normalize=False)
    for prompt, vector in zip(prompts, found, strict=True):
        np.testing.assert_allclose(vector, hidden_states(model, prompt).mean(0), atol=2e-4)


def test_embedding_gemma(tmp_path: Path) -> None:
    """Gemma 3 whose tokens see both sides, within windows in most layers."""
    config = {**SIZES, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 16, "sliding_window_pattern": 3}
    own = {"query_pre_attn_scalar": 16, "use_bidirectional_attention": True, "hidden_activation": "gelu_pytorch_tanh"}
    model = make(tmp_path, "Gemma3Text", **config, **own)
    llm = LLM(str(tmp_path))
    prompts = texts()
    for prompt, found in zip(prompts, embed(llm, prompts, normalize=False), strict=True):
        np.testing.assert_allclose(found, hidden_states(model, prompt).mean(0), atol=2e-4)


def jina_v2_hidden(tensors: dict[str, torch.Tensor], token_ids: list[int], num_heads: int) -> NDArray[np.float32]:
    """JinaBERT v2 as its paper and its published code compute it, in float64."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    hidden = weights["embeddings.word_embeddings.weight"].shape[1]

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, (hidden,), scale, shift, 1e-12)

    x = weights["embeddings.word_embeddings.weight"][token_ids] + weights["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    places = torch.arange(len(token_ids))
    slopes = torch.tensor([2.0 ** (-8 * head / num_heads) for head in range(1, num_heads + 1)])
    bias = -slopes[:, None, None] * (places[:, None] - places).abs()
    for layer in range(SIZES["num_hidden_layers"]):
        name = f"encoder.layer.{layer}"
        q, k, v = (
            dense(x, f"{name}.attention.self.{part}").view(len(x), num_heads, -1).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(1, 2) / q.shape[2] ** 0.5 + bias
        attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = norm(x + dense(attended, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        gate, up = dense(x, f"{name}.mlp.gated_layers").chunk(2, dim=-1)
        x = norm(x + dense(torch.nn.functional.gelu(gate) * up, f"{name}.mlp.wo"), f"{name}.mlp.layernorm")
    return x.float().numpy()


def test_jina_v2(tmp_path: Path) -> None:
    """Symmetric ALiBi and gated MLPs; transformers has no class for it."""
    hidden, inner, num_heads = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (120, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
        "pooler.dense.weight": (hidden, hidden),
        "pooler.dense.bias": (hidden,),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(SIZES["num_hidden_layers"]):
        name = f"encoder.layer.{layer}"
        parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        shapes |= {f"{name}.{part}.weight": (hidden, hidden) for part in parts}
        shapes |= {f"{name}.{part}.bias": (hidden,) for part in parts}
        shapes |= {f"{name}.mlp.gated_layers.weight": (2 * inner, hidden), f"{name}.mlp.wo.weight": (hidden, inner)}
        shapes |= {f"{name}.mlp.wo.bias": (hidden,)}
        norms += [f"{name}.attention.output.LayerNorm", f"{name}.mlp.layernorm"]
    torch.manual_seed(5)
    tensors = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": 1 + torch.randn(hidden) * 0.2 for name in norms}
    tensors |= {f"{name}.bias": torch.randn(hidden) * 0.2 for name in norms}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"architectures": ["JinaBertForMaskedLM"], "model_type": "bert", "position_embedding_type": "alibi"}
    config |= {"feed_forward_type": "geglu", "hidden_act": "gelu", "type_vocab_size": 2, **SIZES}
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompts = texts((1, 5, 130, 47))
    for prompt, found in zip(prompts, embed(LLM(str(tmp_path)), prompts, normalize=False), strict=True):
        np.testing.assert_allclose(found, jina_v2_hidden(tensors, prompt, num_heads).mean(0), atol=2e-4)
    (tmp_path / "config.json").write_text(json.dumps({**config, "feed_forward_type": "reglu"}))
    with pytest.raises(CheckpointError, match=r"feed_forward_type is .reglu"):
        LLM(str(tmp_path))
