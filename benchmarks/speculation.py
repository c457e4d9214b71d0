"""What drafts and batch invariance cost and bring: the same requests with an option and without, taking turns.

    python -m benchmarks.speculation [MODEL ...]

Without a model the bundled one. Every workload runs on two engines in one process, one with the option; they take turns
and each round's prompts are new to both, so that no prefix is found. Tokens per second of output are those of the whole
request, its prompt included. Ratios are with / without, over the medians.

- copy: one request at a time whose answer is mostly in its prompt, as in an edit or a summary that quotes: a passage of
  held-out text, and its beginning once more. Greedy.
- text: the same passages without the beginning again.
- long: one request of 3,000 random tokens.
- W1, W3, W5: those of `benchmarks.peers`, random token ids. Greedy models of random weights fall into loops.
- A name with -sampled: the same at temperature 1, where nothing repeats.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.workloads import Workload, WorkRequest, make_workloads
from quire import LLM, SamplingParams

HELD_OUT = Path(__file__).parents[1] / "tests" / "data" / "held_out.txt"
OPTIONS: dict[str, dict[str, Any]] = {
    "speculation": {"speculative_config": {"method": "ngram"}},
    "deterministic": {"deterministic": True},
}
DEFAULT = "copy,text,text-sampled,W5,W5-sampled,W1,W1-sampled"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=[""])
    parser.add_argument("--option", choices=OPTIONS, default="speculation")
    parser.add_argument("--only", default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantization")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    report = {}
    for model in options.models:
        base: dict[str, Any] = {"max_num_seqs": 64, "quantization": options.quantization}
        without, with_option = LLM(model, **base), LLM(model, **base, **OPTIONS[options.option])
        for name in options.only.split(","):
            figures = compare(without, with_option, name, options.rounds)
            report[f"{model or 'bundled'} {name}"] = figures
            print(f"{Path(model).name or 'bundled'} {name}: {json.dumps(figures)}", flush=True)
    if options.report:
        options.report.write_text(json.dumps(report, indent=2))


def compare(without: LLM, with_option: LLM, name: str, rounds: int) -> dict[str, Any]:
    """Tokens per second of both and their ratio; how the drafts fared."""
    rates: tuple[list[float], list[float]] = ([], [])
    before = with_option.stats()
    num_equal = num_tokens = 0
    for number in range(-1, rounds):
        workload = make_workload(without, name, seed=number)
        outputs = []
        # The first turn changes, since what a machine did last may help or harm what comes next.
        for place in (0, 1) if number % 2 else (1, 0):
            llm = (without, with_option)[place]
            llm.reset_prefix_cache()
            started = time.perf_counter()
            outputs.append((place, run(llm, workload, one_by_one=name.startswith(("copy", "text")))))
            seconds = time.perf_counter() - started
            if number >= 0:
                rates[place].append(workload.num_output_tokens / seconds)
        (_, one), (_, other) = sorted(outputs)
        num_equal += sum(
            a == b for mine, theirs in zip(one, other, strict=True) for a, b in zip(mine, theirs, strict=True)
        )
        num_tokens += sum(map(len, one))
    stats = with_option.stats()
    drafted = stats.total_draft_tokens - before.total_draft_tokens
    accepted = stats.total_accepted_tokens - before.total_accepted_tokens
    medians = [statistics.median(each) for each in rates]
    return {
        "without_tok_s": [round(rate, 1) for rate in sorted(rates[0])],
        "with_tok_s": [round(rate, 1) for rate in sorted(rates[1])],
        "ratio": round(medians[1] / medians[0], 3),
        "drafted": drafted,
        "accepted": accepted,
        "equal_tokens": f"{num_equal}/{num_tokens}",
    }


def make_workload(llm: LLM, name: str, seed: int) -> Workload:
    """Requests that only this seed brings."""
    rng = random.Random(seed)
    name, sampled = name.removesuffix("-sampled"), name.endswith("-sampled")
    if name in ("copy", "text"):
        token_ids = llm.get_tokenizer().encode(HELD_OUT.read_text(encoding="utf-8"))
        requests = []
        for _ in range(4):
            start = rng.randrange(len(token_ids) - 240)
            passage = token_ids[start : start + 200]
            again = passage[:40] if name == "copy" else []
            requests.append(WorkRequest(passage + again, 128))
        return Workload(name, requests, temperature=float(sampled))
    if name == "long":
        return Workload(name, [WorkRequest([rng.randrange(3, 32_000) for _ in range(3_000)], 64)])
    workload = make_workloads()[name]
    shift = rng.randrange(1, 30_000)
    vocab = 32_000 - 3
    requests = [
        WorkRequest([3 + (token + shift) % vocab for token in each.prompt_token_ids], each.num_output_tokens)
        for each in workload.requests
    ]
    return Workload(workload.title, requests, workload.n, float(sampled) or workload.temperature)


def run(llm: LLM, workload: Workload, *, one_by_one: bool) -> list[list[int]]:
    """The tokens of every sample."""
    params = [
        SamplingParams(
            n=workload.n,
            temperature=workload.temperature,
            seed=number,
            max_tokens=request.num_output_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        for number, request in enumerate(workload.requests)
    ]
    pairs = list(zip([request.prompt_token_ids for request in workload.requests], params, strict=True))
    outputs = []
    for group in [[pair] for pair in pairs] if one_by_one else [pairs]:
        outputs += llm.generate([prompt for prompt, _ in group], [params for _, params in group], use_tqdm=False)
    return [list(sample.token_ids) for output in outputs for sample in output.outputs]


if __name__ == "__main__":
    main()
