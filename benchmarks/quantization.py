"""Perplexity of quantised weights: `python -m benchmarks.quantization`. `benchmarks.linear` measures their speed."""

import argparse
import json
import math
from pathlib import Path

from quire import LLM, SamplingParams
from quire.quantization import METHODS

HELD_OUT = Path(__file__).parents[1] / "tests" / "data" / "held_out.txt"


def perplexity(
    *,
    dtype: str,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    threads: int | None = None,
    num_tokens: int | None = None,
) -> float:
    """Perplexity of the bundled model on the held-out text, in rows of the longest context that each begin like a
    document."""
    llm = LLM(
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=2,
        num_blocks=128,
        threads=threads,
    )
    tokenizer = llm.get_tokenizer()
    begin = tokenizer.bos_token_id
    assert begin is not None
    ids = tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"), add_special_tokens=False)[:num_tokens]
    length = llm.memory_plan.max_model_len - 2
    rows = [[begin, *ids[first : first + length]] for first in range(0, len(ids), length)]
    total = 0.0
    for output in llm.generate(rows, SamplingParams(max_tokens=1, prompt_logprobs=0)):
        assert output.prompt_logprobs is not None
        # The first entry of a position is the token of the text.
        total -= sum(next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry is not None)
    return math.exp(total / len(ids))


def perplexity_table(threads: int) -> dict[str, float]:
    found = {"float32": perplexity(threads=threads, dtype="float32")}
    found |= {name: perplexity(threads=threads, dtype="float32", quantization=name) for name in METHODS}
    print(f"Perplexity of the bundled model on {HELD_OUT.name}")
    for name, value in found.items():
        print(f"  {name:8}{value:9.4f}{value / found['float32'] - 1:+9.2%}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the figures to this file, as JSON")
    arguments = parser.parse_args()
    found = perplexity_table(arguments.threads)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
