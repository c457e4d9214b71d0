"""Cost of KV in fewer bits, per weight format, in perplexity and changed tokens: `python -m benchmarks.kv_dtypes`.

Perplexity is that of the bundled model on its held-out text. Tokens are greedy, from the bundled model after passages
of that text and from small random models of five families, whose logits lie closer together than a trained model's. A
token counts as changed if the same weights with float32 KV, given the same tokens before it, rank another token first:
so a change does not count again for the tokens after it. The count for float32 KV itself is the noise of the
comparison, in which prefill kernels judge decode kernels. The last column shows in the same way what rounding of the
weights changes: their tokens with float32 KV, judged by float32 weights.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quantization import HELD_OUT, perplexity
from quire import LLM, SamplingParams
from quire.backends import BACKENDS
from quire.quantization import METHODS
from tests.checkpoints import make_checkpoint

KV_DTYPES = BACKENDS["cpu"].kv_cache_dtypes
FLOAT32: dict[str, Any] = {"dtype": "float32"}
WEIGHTS = {
    "float32": FLOAT32,
    "bfloat16": {"dtype": "bfloat16"},
    **{method: FLOAT32 | {"quantization": method} for method in METHODS},
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
NUM_PROMPTS = 17
"""Prompts of each random model; the bundled model has as many as all of them together."""
NUM_TOKENS = 128
"""Tokens of each answer."""

TokenIds = list[list[int]]
Models = Sequence[tuple[str, TokenIds]]
"""Folder → its prompts; the bundled model's folder is empty."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_dtypes", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    rng = random.Random(0)
    total = NUM_PROMPTS * len(FAMILIES) * NUM_TOKENS
    print(f"Perplexity; changed tokens of {total:,} from the bundled model, and of as many from random models\n")
    print(f"| weights | {' | '.join(f'KV {name}' for name in KV_DTYPES)} | default KV | the weights themselves |")
    print("| --- |" + " --- |" * (len(KV_DTYPES) + 2))
    with tempfile.TemporaryDirectory() as folder:
        bundled = [("", passages(rng))]
        random_models = [
            (str(make_checkpoint(Path(folder) / family, family)), random_prompts(rng)) for family in FAMILIES
        ]
        for weights, options in WEIGHTS.items():
            options = options | {"threads": threads}
            changed = zip(changed_tokens(bundled, options), changed_tokens(random_models, options), strict=True)
            *by_kv, by_weights = [f"{bundled_count}, {random_count}" for bundled_count, random_count in changed]
            values = [perplexity(kv_cache_dtype=kv_dtype, **options) for kv_dtype in KV_DTYPES]
            cells = [f"{value:.4f}; {counts}" for value, counts in zip(values, by_kv, strict=True)]
            default = LLM(**options).memory_plan.kv_cache_dtype
            print(f"| {weights} | {' | '.join(cells)} | {default} | {by_weights} |", flush=True)


def changed_tokens(models: Models, options: dict[str, Any]) -> list[int]:
    """Changed tokens summed over the models: by KV dtype, and by the weights."""
    counts = [0] * (len(KV_DTYPES) + 1)
    for model, prompts in models:
        limits: dict[str, Any] = {"max_num_seqs": len(prompts), "num_blocks": 2048}
        texts = {
            name: greedy_texts(LLM(model, kv_cache_dtype=name, **limits, **options), prompts) for name in KV_DTYPES
        }
        same_weights = LLM(model, kv_cache_dtype="float32", **limits, **options)
        exact = LLM(model, kv_cache_dtype="float32", **limits, **options | FLOAT32 | {"quantization": None})
        found = [num_unlikely(same_weights, texts[name]) for name in KV_DTYPES]
        found.append(num_unlikely(exact, texts["float32"]))
        counts = [count + more for count, more in zip(counts, found, strict=True)]
    return counts


def greedy_texts(llm: LLM, prompts: TokenIds) -> TokenIds:
    """The prompts with their answers."""
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [prompt + output.outputs[0].token_ids for prompt, output in zip(prompts, outputs, strict=True)]


def num_unlikely(llm: LLM, texts: TokenIds) -> int:
    """The number of tokens of the answers that this engine does not rank first."""
    count = 0
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    for output in llm.generate(texts, params, use_tqdm=False):
        assert output.prompt_logprobs is not None
        for entry in output.prompt_logprobs[-NUM_TOKENS:]:
            assert entry is not None
            count += next(iter(entry.values())).rank != 1  # the first entry is the token of the text
    return count


def passages(rng: random.Random) -> TokenIds:
    ids = LLM().get_tokenizer().encode(HELD_OUT.read_text(encoding="utf-8"), add_special_tokens=False)
    starts = [rng.randrange(len(ids) - 100) for _ in range(NUM_PROMPTS * len(FAMILIES))]
    return [ids[start : start + rng.randint(2, 100)] for start in starts]


def random_prompts(rng: random.Random) -> TokenIds:
    return [[rng.randrange(256) for _ in range(rng.randint(2, 100))] for _ in range(NUM_PROMPTS)]


if __name__ == "__main__":
    main()
