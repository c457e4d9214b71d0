"""Gain and cost of drafts and of batch invariance: the same requests with an option and without, in turns.

    python -m benchmarks.speculation [MODEL ...]

The default is the bundled model. Every workload runs on two engines in one process, one with the option. They take
turns, and each round has new prompts, so that there are no prefix hits. Tokens per second are output tokens over the
time of the whole request, its prompt included. If requests come one by one, `decoding` leaves out prompt and first
token, like W5's figure. Ratios are with / without: the median over the rounds.

- edit, revision, quotation, outline, summary: answers that repeat their prompt as such texts do, from
  `benchmarks.recorded_answers`, one per round. Greedy. For models with the vocabulary of W1 to W6.
- copy: one request at a time whose answer is mostly in its prompt: a passage of held-out text, and its beginning once
  more. The answer is the model's own. Greedy.
- text: the same passages without the repeated beginning.
- long: one request of 3,000 random tokens.
- W1, W3, W5: the workloads of `benchmarks.peers`, random token ids. Greedy output of random weights falls into loops.
- A name with -sampled: the same at temperature 1, where nothing repeats.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.workloads import Workload, WorkRequest, make_workloads
from benchmarks.recorded_answers import KINDS, Recorded, recorded_answers
from quire import LLM, SamplingParams

HELD_OUT = Path(__file__).parents[1] / "tests" / "data" / "held_out.txt"
OPTIONS: dict[str, dict[str, Any]] = {
    "speculation": {"speculative_config": {"method": "ngram"}},
    "deterministic": {"deterministic": True},
}
TEXTS = "copy,text,text-sampled"
RANDOM = "W5,W5-sampled,W1,W1-sampled"
WARM_UP = -1
"""Index of the warm-up round."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=[""])
    parser.add_argument("--option", choices=OPTIONS, default="speculation")
    parser.add_argument("--only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantization")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    report = {}
    for model in options.models:
        recorded = Recorded()
        base: dict[str, Any] = {"quantization": options.quantization, "logits_processors": [recorded]}
        engines = LLM(model, max_num_seqs=64, **base), LLM(model, max_num_seqs=64, **base, **OPTIONS[options.option])
        only = options.only or f"{','.join(KINDS) if model else TEXTS},{RANDOM}"
        for name in only.split(","):
            figures = compare(engines, recorded, name, options.rounds)
            report[f"{model or 'bundled'} {name}"] = figures
            print(f"{Path(model).name or 'bundled'} {name}: {json.dumps(figures)}", flush=True)
    if options.report:
        options.report.write_text(json.dumps(report, indent=2))


def compare(engines: tuple[LLM, LLM], recorded: Recorded, name: str, rounds: int) -> dict[str, Any]:
    """Tokens per second of both engines, the second with the option, and its accepted drafts."""
    sides = [Side(llm) for llm in engines]
    kind = name.removesuffix("-sampled")
    one_by_one = kind in KINDS or kind in ("copy", "text", "long", "W5")
    for number in range(WARM_UP, rounds):
        if kind in KINDS:
            recorded.answers = recorded_answers(kind, rounds)[max(number, 0) :]
        workload = make_workload(engines[0], kind, number, recorded, temperature=float(kind != name))
        for side in sides:
            if number == 0:
                side.start()
            side.start_round()
        places = range(len(workload.requests))
        for batch in [[place] for place in places] if one_by_one else [list(places)]:
            # Alternate who begins: the previous load of a machine affects the next run.
            for side in sides if (number + batch[0]) % 2 else reversed(sides):
                side.run(workload, batch)
        for side in sides:
            side.end_round()
    recorded.answers = ()
    without, with_option = sides
    pairs = list(zip(without.tokens, with_option.tokens, strict=True))
    after = with_option.llm.stats()
    drafted = after.total_draft_tokens - with_option.before.total_draft_tokens
    accepted = after.total_accepted_tokens - with_option.before.total_accepted_tokens
    return {
        "without_tok_s": without.rates,
        "with_tok_s": with_option.rates,
        "ratio": _ratio(without.seconds, with_option.seconds),
        **({"decoding": _ratio(without.decoding, with_option.decoding)} if one_by_one else {}),
        "drafted": drafted,
        "accepted": accepted,
        "tokens_per_step": round(len(pairs) / (after.total_steps - with_option.before.total_steps), 2),
        "equal_tokens": f"{sum(a == b for a, b in pairs)}/{len(pairs)}",
    }


def _ratio(before: Sequence[float], after: Sequence[float]) -> float:
    """Speed-ups, one per round."""
    return round(statistics.median(one / other for one, other in zip(before, after, strict=True)), 3)


class Side:
    """One of the two engines, and the times of its rounds."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.start()

    def start(self) -> None:
        """Clear all measurements."""
        self.before = self.llm.stats()
        self.tokens: list[int] = []
        """Output tokens of every sample of every request."""
        self.seconds: list[float] = []
        """Seconds of each round."""
        self.decoding: list[float] = []
        """Seconds of each round after the first token."""
        self.rates: list[float] = []

    def start_round(self) -> None:
        self.seconds.append(0.0)
        self.decoding.append(0.0)
        self._num_tokens = len(self.tokens)

    def run(self, workload: Workload, places: Sequence[int]) -> None:
        """Generate for these requests of the workload, all at once."""
        params = [
            SamplingParams(
                n=workload.n,
                temperature=workload.temperature,
                seed=place,
                max_tokens=workload.requests[place].num_output_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            for place in places
        ]
        prompts = [workload.requests[place].prompt_token_ids for place in places]
        self.llm.reset_prefix_cache()
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        self.seconds[-1] += time.perf_counter() - started
        for output in outputs:
            metrics = output.metrics
            assert metrics is not None
            assert metrics.first_token_time is not None
            assert metrics.last_token_time is not None
            self.decoding[-1] += metrics.last_token_time - metrics.first_token_time
            for sample in output.outputs:
                self.tokens += sample.token_ids

    def end_round(self) -> None:
        self.rates.append(round((len(self.tokens) - self._num_tokens) / self.seconds[-1], 1))


def make_workload(llm: LLM, kind: str, seed: int, recorded: Recorded, temperature: float) -> Workload:
    """The workload of one seed. Recorded answers start with the first."""
    rng = random.Random(seed)
    if kind in KINDS:
        answer = recorded.answers[0]
        length = 32 if seed == WARM_UP else len(answer.token_ids)
        return Workload(kind, [WorkRequest(answer.prompt_token_ids, length)], temperature=temperature)
    if kind in ("copy", "text"):
        token_ids = llm.get_tokenizer().encode(HELD_OUT.read_text(encoding="utf-8"))
        requests = []
        for _ in range(4):
            start = rng.randrange(len(token_ids) - 240)
            passage = token_ids[start : start + 200]
            again = passage[:40] if kind == "copy" else []
            requests.append(WorkRequest(passage + again, 128))
        return Workload(kind, requests, temperature=temperature)
    if kind == "long":
        return Workload(kind, [WorkRequest([rng.randrange(3, 32_000) for _ in range(3_000)], 64)])
    workload = make_workloads()[kind]
    shift = rng.randrange(1, 30_000)
    vocab = 32_000 - 3
    requests = [
        WorkRequest([3 + (token + shift) % vocab for token in each.prompt_token_ids], each.num_output_tokens)
        for each in workload.requests
    ]
    return Workload(workload.title, requests, workload.n, temperature or workload.temperature)


if __name__ == "__main__":
    main()
