"""Tokens per second against concurrency and against context: `python -m benchmarks.scaling MODEL [--plot FILE]`.

Only decoding is measured: the clock starts when every sequence has its first token. Each concurrency decodes after
prompts of 128 tokens. Each context decodes one sequence and sixteen, after prompts of that length that share nothing.
Runs that the model or the KV pool cannot hold are left out.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.ceilings import measure_ceilings
from quire import LLM, SamplingParams
from quire.quantization import METHODS

CONCURRENCY = (1, 4, 16, 64, 256)
CONTEXTS = (128, 512, 2048, 8192)
SEQUENCES = (1, 16)
"""The concurrencies at which contexts are compared."""
PROMPT = 128
STEPS = 32


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", choices=METHODS)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCY)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--at-once", type=int, nargs="+", default=SEQUENCES, help="sequences at once, for each context")
    parser.add_argument("--output", type=Path, help="also write the figures to this file, as JSON")
    parser.add_argument("--plot", type=Path, help="plot to this SVG file")
    options = parser.parse_args()
    llm = LLM(
        model=options.model,
        dtype=options.dtype,
        quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype,
        max_num_seqs=max(4, *options.concurrency, *options.at_once),
        enable_prefix_caching=False,
    )
    ceilings = measure_ceilings(0.5)
    for _ in range(3):
        decode_rate(llm, 4, 64)  # caches and clocks warm up
    by_concurrency = {
        count: decode_rate(llm, count, PROMPT) for count in options.concurrency if fits(llm, count, PROMPT)
    }
    by_context = {
        count: {length: decode_rate(llm, count, length) for length in options.contexts if fits(llm, count, length)}
        for count in options.at_once
    }
    stored = options.quantization or options.dtype
    print(f"{Path(options.model).name}, {stored}; {json.dumps(ceilings)}\n")
    print("| sequences at once | " + " | ".join(map(str, by_concurrency)) + " |")
    print("| --- |" + " --- |" * len(by_concurrency))
    print("| tokens/s | " + " | ".join(f"{rate:.0f}" for rate in by_concurrency.values()) + " |\n")
    print("| context | " + " | ".join(map(str, options.contexts)) + " |")
    print("| --- |" + " --- |" * len(options.contexts))
    for count, rates in by_context.items():
        cells = (f"{rates[length]:.0f}" if length in rates else "–" for length in options.contexts)
        print(f"| tokens/s of {count} | {' | '.join(cells)} |")
    found = {"weights": stored, "ceilings": ceilings, "by_concurrency": by_concurrency, "by_context": by_context}
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot is not None:
        draw(found, options.plot)


def num_output_tokens(llm: LLM, num_sequences: int, prompt: int) -> int:
    """Early sequences decode while the others' prompts are computed, and must not finish before."""
    budget = llm.memory_plan.max_num_batched_tokens
    return STEPS + 2 + 2 * num_sequences * prompt // max(1, budget - num_sequences)


def fits(llm: LLM, num_sequences: int, prompt: int) -> bool:
    plan = llm.memory_plan
    length = prompt + num_output_tokens(llm, num_sequences, prompt)
    blocks = num_sequences * -(-length // plan.block_size)
    return length <= plan.max_model_len and blocks <= plan.num_blocks


def decode_rate(llm: LLM, num_sequences: int, prompt: int) -> float:
    """Tokens per second of `num_sequences` that decode together, each after its own prompt of `prompt` tokens."""
    engine = llm._engine
    max_tokens = num_output_tokens(llm, num_sequences, prompt)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    names = [f"{num_sequences} behind {prompt}, {index}" for index in range(num_sequences)]
    for index, name in enumerate(names):
        ids = [3 + (7919 * index + 31 * place) % 200 for place in range(prompt)]
        engine.add_request(name, {"prompt_token_ids": ids}, params)
    seconds: list[float] = []
    while len(seconds) <= STEPS:
        start = time.perf_counter()
        outputs = engine.step()
        took = time.perf_counter() - start
        if len(outputs) == num_sequences:
            seconds.append(took)
    for name in names:
        engine.abort(name)
    return num_sequences * STEPS / sum(seconds[1:])  # the first step may have completed a prompt


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "quire", "font.size": 8, "axes.spines.top": False}):
        figure = Figure(figsize=(6.4, 2.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(*zip(*found["by_concurrency"].items(), strict=True), "o-", color="#1d5f8a")
        left.set(xscale="log", yscale="log", xlabel="sequences at once", ylabel="tokens/s")
        right.set_prop_cycle(color=["#1d5f8a", "#c8553d", "#4a9d5b", "#e0a526"])
        for count, rates in found["by_context"].items():
            right.plot(rates.keys(), rates.values(), "o-", label=f"{count} at once")
        right.set(xscale="log", yscale="log", xlabel="context, tokens")
        right.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
