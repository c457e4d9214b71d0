"""Cost of structured output: tokens/s of a batch with a JSON schema against the same batch without, and mask times.

`python -m benchmarks.structured [model] [--requests 32] [--max-tokens 192] [--rounds 7]` prints JSON. Both runs
generate the same number of tokens per request: the unconstrained batch generates as many as the constrained one did.
They take turns, and the medians of several rounds are compared. Mask times are llguidance's own time per token,
replayed over the generated texts.
"""

import argparse
import json
import statistics
import time

import numpy as np
from llguidance import LLExecutor

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.engine.grammars import read_compiler
from quire.model_config import ModelConfig

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 40, "maxLength": 120},
        "speaker": {"type": "string", "minLength": 10, "maxLength": 60},
        "act": {"type": "integer", "minimum": 1, "maximum": 5},
        "lines": {"type": "array", "items": {"type": "string", "minLength": 30, "maxLength": 90}, "minItems": 2},
        "mood": {"enum": ["merry", "grave", "angry", "tender"]},
    },
    "required": ["title", "speaker", "act", "lines", "mood"],
    "additionalProperties": False,
}
FORM = StructuredOutputsParams(json=SCHEMA)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    model: str = arguments.model
    figures = {}
    texts: list[list[int]] = []
    for fast_forward in (False, True):
        llm = LLM(model, max_num_seqs=arguments.requests, fast_forward=fast_forward)
        rates, texts = compare(llm, arguments.requests, arguments.max_tokens, arguments.rounds)
        figures["fast_forward" if fast_forward else "every_token_sampled"] = rates
    print(json.dumps({"model": model or "bundled", **figures, "mask_us": mask_times(llm, texts)}, indent=2))


def compare(llm: LLM, num_requests: int, max_tokens: int, rounds: int) -> tuple[dict[str, float], list[list[int]]]:
    """Tokens/s without and with the schema, and the tokens generated with it."""
    prompts = [f"Scene {number}. Enter a citizen, and speaks:" for number in range(num_requests)]
    formed = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, structured_outputs=FORM)
        for seed in range(num_requests)
    ]
    outputs = [output.outputs[0].token_ids for output in llm.generate(prompts, formed, use_tqdm=False)]
    free = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=len(tokens), ignore_eos=True)
        for seed, tokens in enumerate(outputs)
    ]
    rates: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        for name, params in (("without", free), ("with", formed)):
            llm.reset_prefix_cache()
            started = time.perf_counter()
            count = sum(len(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False))
            rates[name].append(count / (time.perf_counter() - started))
    without, with_schema = (statistics.median(rates[name]) for name in ("without", "with"))
    ratio = statistics.median(b / a for a, b in zip(rates["without"], rates["with"], strict=True))
    return {
        "tokens": sum(map(len, outputs)),
        "without_tokens_per_s": round(without),
        "with_tokens_per_s": round(with_schema),
        "ratio": round(ratio, 3),
    }, outputs


def mask_times(llm: LLM, texts: list[list[int]]) -> dict[str, float]:
    """Microseconds for the mask of one token and for consuming it, over all tokens of the texts."""
    config = ModelConfig.from_folder(llm._engine.folder)
    compiler = read_compiler(llm._engine.folder, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
    grammar = compiler.compile(FORM)
    executor, bits = LLExecutor(1), np.zeros((1, grammar.num_mask_words), dtype=np.uint32)
    masks: list[float] = []
    follows: list[float] = []
    for tokens in texts:
        matcher = grammar.matcher()
        for token_id in tokens:
            started = time.perf_counter()
            executor.unsafe_compute_mask_ptr([(matcher, 0)], bits.ctypes.data, bits.nbytes, 1)  # type: ignore[list-item]
            masked = time.perf_counter()
            matcher.consume_token(token_id)
            matcher.compute_ff_tokens()
            follows.append(1e6 * (time.perf_counter() - masked))
            masks.append(1e6 * (masked - started))
    found = {"tokens": float(len(masks))}
    for name, values in (("mask", masks), ("follow", follows)):
        p50, p99 = np.percentile(values, [50, 99])
        found |= {f"{name}_p50": round(float(p50), 1), f"{name}_p99": round(float(p99), 1)}
    return found


if __name__ == "__main__":
    main()
