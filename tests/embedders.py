"""Small folders of embedding models and rerankers with random weights and a WordPiece tokenizer, for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, Qwen3Config, Qwen3ForCausalLM

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *("a", "cat", "dog", "sat", "on", "the", "mat", "what", "is", "paris", "capital", "of", "france", "query", ":"),
    *("##s", "##ing", "run", "big", "red", "no", "yes", ".", "?", "berlin", "germany", "city", "document", ","),
)
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def make_bert(folder: Path, *, num_labels: int = 0, **options: Any) -> Any:
    """A BERT, or with labels a classifier; its tokenizer is a vocab.txt alone. Returns transformers' model."""
    torch.manual_seed(3)
    model: Any
    if num_labels:
        names = {index: f"class {index}" for index in range(num_labels)}
        model = BertForSequenceClassification(BertConfig(**SIZES, id2label=names, **options))
    else:
        model = BertModel(BertConfig(**SIZES, **options))
    return _save(model, folder)


def make_judge(folder: Path) -> Any:
    """A decoder with a chat model's config."""
    torch.manual_seed(4)
    sizes = {**SIZES, "max_position_embeddings": 512}
    return _save(Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8)), folder)


def make_modules(folder: Path, *kinds: str, pooling: dict[str, Any] | None = None, dense: int = 12) -> torch.nn.Linear:
    """A modules.json of sentence-transformers with modules of these kinds, and their folders."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    linear = torch.nn.Linear(SIZES["hidden_size"], dense)
    for index, kind in enumerate(kinds, 1):
        path = folder / f"{index}_{kind}"
        path.mkdir()
        modules.append({"idx": index, "name": str(index), "path": path.name, "type": f"sentence_transformers.x.{kind}"})
        if kind == "Pooling":
            (path / "config.json").write_text(json.dumps(pooling or {"pooling_mode": "mean"}))
        if kind == "Dense":
            from safetensors.torch import save_file

            config = {"in_features": linear.in_features, "out_features": dense, "bias": True}
            config["activation_function"] = "torch.nn.modules.activation.Tanh"
            (path / "config.json").write_text(json.dumps(config))
            tensors = {"linear.weight": linear.weight.detach(), "linear.bias": linear.bias.detach()}
            save_file(tensors, path / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(modules))
    return linear


def _save(model: Any, folder: Path) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "orm" in name and name.endswith("weight") else 0.0, 0.3)
    model.eval().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return model
