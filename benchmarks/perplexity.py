"""Perplexity of a model in the ways it can be stored: `python -m benchmarks.perplexity MODEL --quantization int8 int4`.

float32 comes first, and every other figure stands beside it with its difference. The text is cut into rows of equal
length that each begin like a document, so the figure belongs to that length: compare only what was measured alike.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from quire import LLM, SamplingParams
from quire.quantization import METHODS

HELD_OUT = Path(__file__).parents[1] / "tests" / "data" / "held_out.txt"
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    **{name: {"dtype": "float32", "quantization": name} for name in METHODS},
}
"""How a model may be stored, as options of `LLM`."""


def perplexity(llm: LLM, text: str, *, num_tokens: int | None = None, row_length: int | None = None) -> float:
    """Perplexity of `llm` on the first `num_tokens` of a text, in rows of `row_length`, by default of the longest
    context."""
    rows = rows_of(llm, text, num_tokens, row_length or llm.memory_plan.max_model_len - 2)
    total, count = 0.0, 0
    for output in llm.generate(rows, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False):
        assert output.prompt_logprobs is not None
        # The first entry of a position is the token of the text; the first token of a row follows nothing.
        found = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry is not None]
        total -= sum(found)
        count += len(found)
    return math.exp(total / count)


def rows_of(llm: LLM, text: str, num_tokens: int | None, row_length: int) -> list[list[int]]:
    """The token ids of the rows that are scored, each from its second on."""
    tokenizer = llm.get_tokenizer()
    begin = tokenizer.bos_token_id
    opening = [] if begin is None else [begin]
    ids = tokenizer.encode(text, add_special_tokens=False)[:num_tokens]
    return [[*opening, *ids[first : first + row_length]] for first in range(0, len(ids), row_length)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perplexity", description=__doc__)
    parser.add_argument("model", nargs="?", help="a folder or a name; by default the bundled model")
    parser.add_argument("--quantization", nargs="+", choices=WAYS, default=list(METHODS), metavar="WAY")
    parser.add_argument("--text", type=Path, default=HELD_OUT)
    parser.add_argument("--num-tokens", type=int, help="of the text; by default all")
    parser.add_argument("--row-length", type=int, help="tokens of a row; by default the longest context")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the figures to this file, as JSON")
    arguments = parser.parse_args()
    text, found = arguments.text.read_text(encoding="utf-8"), {}
    for name in dict.fromkeys(("float32", *arguments.quantization)):
        room: dict[str, Any] = {} if arguments.row_length is None else {"max_model_len": arguments.row_length + 2}
        with LLM(arguments.model, threads=arguments.threads, max_num_seqs=2, **WAYS[name], **room) as llm:
            found[name] = perplexity(llm, text, num_tokens=arguments.num_tokens, row_length=arguments.row_length)
        print(f"{name:10}{found[name]:10.4f}{found[name] / found['float32'] - 1:+9.2%}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
