"""`python scripts/write_models_page.py`: writes docs/models.md from the table of architectures.

A test holds the page to the table; run this after adding a row.
"""

from pathlib import Path
from typing import Any

from quire.model_config.architectures import ARCHITECTURES, Architecture

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

HEADING = """# Models

Written by `python scripts/write_models_page.py`; do not edit.

Quire opens Hugging Face folders whose config.json names one of these architectures. Logits equal transformers' within
2e-4 in float32, and greedy tokens are the same, for small random checkpoints of every family (`tests/models`,
`tests/engine/test_parity.py`). Weights are safetensors of 16 or 32 bits; `--quantization int8|int4` packs any of them.

| `architectures` | code | traits that the architecture implies |
| --- | --- | --- |
"""

TRAITS: dict[str, str] = {
    "num_experts": "experts",
    "num_local_experts": "experts",
    "alibi": "ALiBi",
    "recurrent_kind": "recurrent layers beside attention",
    "attention_gate": "gated attention",
    "learned_positions": "learned positions",
    "parallel_residual": "parallel residual",
    "post_norms": "norms after the halves of a layer",
    "qk_norm": "norms of queries and keys",
    "qkv_bias": "biases of queries, keys and values",
    "sliding_window": "sliding window",
    "attn_logit_softcapping": "soft caps",
    "embedding_multiplier": "factors of embeddings, residuals and logits",
}
"""A key of a row → what it means to a reader. Layer norms and plain MLPs are told from values."""


def traits(row: Architecture) -> list[str]:
    """What the row's implied values say, in the order of TRAITS."""
    implied: dict[str, Any] = {**row.implied, **{key: True for key in row.names if key in ("num_experts", "qk_norm")}}
    found = [text for key, text in TRAITS.items() if implied.get(key)]
    if implied.get("norm") == "layer_norm":
        found.append("LayerNorm")
    if implied.get("gated_mlp") is False:
        found.append("an MLP without gate")
    if implied.get("rotary_layout") == "interleaved":
        found.append("rotation of adjacent pairs")
    if implied.get("partial_rotary_factor"):
        found.append("rotation of a part of each head")
    return list(dict.fromkeys(found))


def models_page() -> str:
    """The page as it should be."""
    lines = []
    for name, row in sorted(ARCHITECTURES.items(), key=lambda item: item[0].lower()):
        module = row.model.partition(":")[0].removeprefix("quire.").replace(".", "/")
        lines.append(f"| {name} | `{module}.py` | {', '.join(traits(row)) or 'none; config.json says the rest'} |\n")
    return HEADING + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(models_page())
