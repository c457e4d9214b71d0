"""`python scripts/write_models_page.py`: writes docs/models.md from the table of architectures.

A test holds the page to the table; run this after adding a row. With `--measure` it first measures parity: for every
small random checkpoint of `tests/checkpoints.py` how far a logit is from transformers' at most.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from quire.model_config.architectures import ARCHITECTURES, Architecture
from quire.model_config.encoder_architectures import ENCODER_ARCHITECTURES, ENCODER_ENDINGS
from quire.model_config.model_config import ModelConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
PARITY = ROOT / "tests" / "data" / "parity.json"
PUBLISHED = ROOT / "tests" / "data" / "configs" / "published.json"

HEADING = """# Models

Written by `python scripts/write_models_page.py`; do not edit.

Quire opens Hugging Face folders whose config.json names one of these architectures. Greedy tokens equal transformers',
for small random checkpoints of every family (`tests/engine/test_parity_table.py`). "Parity" is the largest difference
of a logit from transformers' in float32, of a prompt in pieces, measured for these checkpoints; a test measures it
again (`tests/models/test_parity_errors.py`). Weights are safetensors of 16 or 32 bits, and MXFP4 where it is said;
`--quantization int8|int4` packs any of them. "Published" gives examples with their parameters, as `quire plan` counts
them.

| `architectures` | code | parity | traits that the architecture implies | published |
| --- | --- | --- | --- | --- |
"""

THROUGH_TRANSFORMERS = """
## Through transformers

Any other decoder of transformers 5 runs on the paged cache, more slowly, if `quire-llm[transformers]` is installed. A
line at start says so. It is looked at first: each layer must ask the library's attention interface for the heads that
config.json names, see all earlier tokens or a window of them, and let tokens meet nowhere else; else it is refused
with the reason while it loads: MiniCPM3 for its latent attention, Gemma 4 for heads of two sizes. Of transformers 5.24
these give the library's greedy tokens: Afmoe, Apertus 1.5, Aria, BitNet, Cohere2-MoE, FlexOlmo, Gemma 3n (its text
model, whose last layers keep copies of the keys and values that they share), Granite-SWA, Granite-MoE-SWA,
Granite-MoE-shared, Hunyuan V3, HyperCLOVA-X, Jais 2, Laguna, Mellum, MiniMax-M2 and M3, NanoChat, Nemotron, OLMo,
Solar-Open, VaultGemma (some in `tests/models/test_transformers_model.py`).
"""

ENCODERS = """
## Encoders

`models/encoder.py` computes these families for [embeddings and scores](embeddings.md). Hidden states, poolings and
heads are those of transformers within 2e-4 (`tests/models/test_encoders.py`). A name ends in {endings}:
{families}. A decoder's name may end in ForSequenceClassification in place of ForCausalLM.
"""

SAME_CODE: dict[str, str] = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "InternLM2ForCausalLM": "LlamaForCausalLM",
    "InternLM3ForCausalLM": "LlamaForCausalLM",
    "Mistral3ForConditionalGeneration": "Ministral3ForCausalLM",
    **dict.fromkeys(("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"), "LlamaForCausalLM"),
    **dict.fromkeys(("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"), "LlamaForCausalLM"),
    "Qwen2VLForConditionalGeneration": "Qwen2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2ForCausalLM",
    "MPTForCausalLM": "MptForCausalLM",
    "Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeForCausalLM",
}
"""A row without a checkpoint of its own in the tests → the row whose computation it shares, tested in another way."""

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
    "attention_sinks": "attention sinks",
    "latent_attention": "one latent row a token in the cache (MLA)",
    "attn_logit_softcapping": "soft caps",
    "embedding_multiplier": "factors of embeddings, residuals and logits",
}
"""A key of a row → what it means to a reader. Layer norms and plain MLPs are told from values."""


def traits(row: Architecture) -> list[str]:
    """What the row's implied values say, in the order of TRAITS."""
    implied: dict[str, Any] = {
        **row.implied,
        **row.constants,
        **{key: True for key in row.names if key in ("num_experts", "qk_norm")},
    }
    found = ["images"] if row.vision else []
    found += [text for key, text in TRAITS.items() if implied.get(key)]
    if implied.get("norm") == "layer_norm":
        found.append("LayerNorm")
    if implied.get("gated_mlp") is False:
        found.append("an MLP without gate")
    found += [f"{quantization.upper()} weights" for quantization in row.quantizations]
    if implied.get("rotary_layout") == "interleaved":
        found.append("rotation of adjacent pairs")
    if implied.get("partial_rotary_factor"):
        found.append("rotation of a part of each head")
    return list(dict.fromkeys(found))


def models_page() -> str:
    """The page as it should be."""
    parity: dict[str, float] = json.loads(PARITY.read_text())
    examples = published_sizes()
    lines = []
    decoders = [item for item in ARCHITECTURES.items() if item[0] not in ENCODER_ARCHITECTURES]
    for name, row in sorted(decoders, key=lambda item: item[0].lower()):
        module = row.model.partition(":")[0].removeprefix("quire.").replace(".", "/")
        error = f"{parity[name]:.0e}" if name in parity else f"as {SAME_CODE[name]}"
        told = ", ".join(traits(row)) or "none; config.json says the rest"
        lines.append(f"| {name} | `{module}.py` | {error} | {told} | {', '.join(examples.get(name, ()))} |\n")
    families = sorted(name.removesuffix("Model") for name in ENCODER_ARCHITECTURES if name.endswith("Model"))
    encoders = ENCODERS.format(endings=" or ".join(ENCODER_ENDINGS), families=", ".join(families))
    return HEADING + "".join(lines) + THROUGH_TRANSFORMERS + encoders


def published_sizes() -> dict[str, list[str]]:
    """Architecture → published models and their parameters."""
    found: dict[str, list[str]] = {}
    for name, config in json.loads(PUBLISHED.read_text()).items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            model = ModelConfig.from_folder(folder)
        found.setdefault(model.architecture, []).append(f"{name} {_billions(model.spec.num_parameters)}")
    return found


def _billions(count: int) -> str:
    return f"{count / 1e9:,.1f} B" if count >= 1e9 else f"{count / 1e9:.2f} B"


def measure_parity() -> dict[str, float]:
    """Architecture → the largest difference of a logit of its checkpoints, to two digits."""
    from tests.checkpoints import FAMILIES, make_checkpoint
    from tests.models.parity import largest_difference

    found: dict[str, float] = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as name:
            folder = make_checkpoint(name, family)
            architecture = ModelConfig.from_folder(folder).architecture
            error = largest_difference(folder)
        found[architecture] = max(found.get(architecture, 0.0), float(f"{error:.1e}"))
        print(f"{family}: {error:.1e}", flush=True)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


if __name__ == "__main__":
    if "--measure" in sys.argv[1:]:
        sys.path.insert(0, str(ROOT))
        PARITY.write_text(json.dumps(measure_parity(), indent=1) + "\n")
    PAGE.write_text(models_page())
