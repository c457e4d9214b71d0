"""GPU figures beside the card's ceilings: kernels, decode and serving of two published shapes, and transformers.

    python -m benchmarks.gpu [--only decode 0.6B ...] [--minutes 9] [--output FILE]

One run makes one table with the card's name; ceilings are measured in the same run. Rows come in order of importance
and are kept as they come; a row for which no time is left says so (`benchmarks/gpu_table.py`). Weights are random
(load_format=dummy) in the shapes of Qwen3-0.6B and Llama-3.1-8B, in bfloat16. Sequences ignore end tokens, so that
every run does the same work. Figures of models are those of the engine's core, token ids in and out: random weights
have no text. Each figure is the best of REPEATS runs after one to warm up. Without a CUDA device nothing is measured.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from benchmarks.from_sources import use_sources
from benchmarks.gpu_kernels import (
    LARGE_DECODE,
    SMALL_DECODE,
    Card,
    ceilings,
    decode_figures,
    flashinfer_figures,
    prefill_figures,
    ragged_figures,
    sharing_figures,
    small_figures,
)
from benchmarks.gpu_table import Figure, Measurement, Table, measure_all, one_line

REPEATS = 2
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "8B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}
"""The published shapes, without scaling of rotary positions, which costs nothing."""
DECODE_TARGETS = {"0.6B": {1: (1_600, 3_284), 256: (23_000, 35_200)}, "8B": {1: (215, 284), 256: (15_000, 22_300)}}
"""Tokens per second with 1k of context on an H200: the goal, and the limit by its memory."""
WORKLOAD_TARGETS = {"0.6B": (20_000, 36_100), "8B": (9_500, 14_100)}
WORKLOAD = (256, 100, 1024)
"""nano-vllm's workload: sequences, and the range of input and output tokens of each."""
CONTEXT, DECODE_STEPS = 1024, 128
ENGINE: dict[str, Any] = {"device": "cuda", "load_format": "dummy", "max_model_len": 2304, "max_num_seqs": 256}
COMPARED = (64, 512, 128)
"""For transformers: sequences, input tokens and output tokens of each."""
CONTINUOUS_BATCHING: dict[str, Any] = {}
"""Attention implementation of transformers: its default."""
RESULTS = Path(__file__).with_name("results") / "gpu.md"

Params = Sequence[dict[str, Any]]
"""SamplingParams of each sequence, with its max_tokens."""


def write_shape(folder: Path, shape: dict[str, Any]) -> Path:
    """A model folder with a config.json and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


def random_prompts(lengths: Sequence[int]) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1000) for _ in range(length)] for length in lengths]


class Core:
    """The engine's core with one model, and the time of its steps."""

    def __init__(self, folder: Path) -> None:
        from quire.config import EngineConfig
        from quire.engine.build import build_core
        from quire.engine.memory_plan import plan_memory
        from quire.model_config import ModelConfig

        config, model = EngineConfig.from_options(ENGINE), ModelConfig.from_folder(folder)
        plan = plan_memory(config, model)
        for line in plan.describe():
            print(line, flush=True)
        self._core = build_core(config, model, plan, folder, lambda phase, seconds: None)

    def run(self, prompts: Sequence[list[int]], params: Params) -> list[float]:
        """Continue all prompts. Returns the seconds of the steps after the first in which every sequence got a
        token."""
        from quire.request import Request
        from quire.sampling_params import SamplingParams

        for index, (prompt, options) in enumerate(zip(prompts, params, strict=True)):
            self._core.add(
                Request(
                    request_id=str(index),
                    prompt_token_ids=prompt,
                    params=SamplingParams(**options, ignore_eos=True),
                    seed=index,
                    max_tokens=options["max_tokens"],
                )
            )
        steps, started = [], 0.0
        while self._core.has_work:
            deltas = self._core.step()
            ended = time.perf_counter()
            for delta in deltas:
                if delta.error is not None:
                    raise RuntimeError(f"a sequence failed: {delta.error}")
            if started and len(deltas) == len(prompts):
                steps.append(ended - started)
            started = ended if len(deltas) == len(prompts) else 0.0
        return steps

    def seconds(self, prompts: Sequence[list[int]], params: Params) -> float:
        """Seconds from the first prompt to the last token: the best of REPEATS, without prefix hits."""
        times = []
        for _ in range(1 + REPEATS):
            self._capture_graphs()
            self._core.reset_prefix_cache()
            started = time.perf_counter()
            self.run(prompts, params)
            times.append(time.perf_counter() - started)
        return min(times[1:])

    def decode_seconds(self, batch: int) -> float:
        """Seconds of a step in which `batch` sequences decode around CONTEXT tokens. From the second run on, prompts
        are prefix hits, so that all sequences begin together."""
        prompts = random_prompts([CONTEXT - DECODE_STEPS // 2] * batch)
        params = [{"temperature": 0.0, "max_tokens": DECODE_STEPS}] * batch
        self._core.reset_prefix_cache()
        means = []
        for _ in range(1 + REPEATS):
            self._capture_graphs()
            steps = self.run(prompts, params)
            means.append(statistics.fmean(steps) if steps else float("inf"))
        return min(means[1:])

    def graph_seconds(self, card: Card, batch: int) -> float | None:
        """Seconds of the CUDA graph of a decode step alone; None without graphs. It repeats the last step, whose
        attention plan is still on the device."""
        from quire.runner.cuda_graphs import Outcome

        runner: Any = self._core._executor  # there is no public interface to run a step without requests
        graphs = getattr(runner._graphs, "_graphs", {})
        keys = [key for key in graphs if key.size == batch and key.outcome is Outcome.TOKENS]
        if not keys:
            return None
        graph, _ = graphs[min(keys)]  # if there are several: the one without shared keys
        with torch.inference_mode():
            seconds = card.time(graph.replay)
        self._core.reset_prefix_cache()  # the graph wrote into free blocks
        return seconds

    def _capture_graphs(self) -> None:
        """Do the work that a server does when it is idle."""
        while self._core.has_idle_work:
            self._core.step()

    def close(self) -> None:
        self._core.close()


def model_figures(card: Card, name: str, folder: Path) -> Iterator[Figure]:
    core = Core(folder)
    try:
        for batch in sorted(DECODE_TARGETS[name], reverse=True):
            target, limit = DECODE_TARGETS[name][batch]
            seconds = core.decode_seconds(batch)
            what, shown = f"{name} decode, batch {batch}, 1k context", f"{batch / seconds:,.0f} tok/s"
            yield Figure(what, shown, f"{target:,}", f"{limit:,}")
            if batch > 1:
                alone = core.graph_seconds(card, batch)
                shown = "no graph" if alone is None else f"{1e3 * (seconds - alone):.2f} of {1e3 * seconds:.2f} ms"
                yield Figure(f"{name} exposed host time a step, batch {batch}", shown, "≤ 0.2 ms", "0")
        rng = random.Random(1)
        count, shortest, longest = WORKLOAD
        prompts = random_prompts([rng.randint(shortest, longest) for _ in range(count)])
        params = [
            {"temperature": 0.6, "max_tokens": rng.randint(shortest, longest), "seed": index} for index in range(count)
        ]
        rate = sum(each["max_tokens"] for each in params) / core.seconds(prompts, params)
        target, limit = WORKLOAD_TARGETS[name]
        what = f"{name} nano-vllm's workload, {count} × {shortest}–{longest:,} in and out"
        yield Figure(what, f"{rate:,.0f} tok/s", f"{target:,}", f"{limit:,}")
    finally:
        core.close()


def transformers_figures(card: Card, name: str, folder: Path) -> Iterator[Figure]:
    """Quire and transformers' two ways to generate, on the same card with the same shape and prompts."""
    if find_spec("transformers") is None:
        yield Figure(f"{name} against transformers", "not measured: transformers is not installed", "≥ 10×, ≥ 3×")
        return
    batch, length, num_steps = COMPARED
    prompts, params = random_prompts([length] * batch), [{"temperature": 0.0, "max_tokens": num_steps}] * batch
    core = Core(folder)
    try:
        own = core.seconds(prompts, params)
    finally:
        core.close()
        del core
        card.clean_up()
    targets = {"generate": "≥ 10×", "generate_batch": "≥ 3×"}
    with ways_of_transformers(card, folder, prompts, num_steps) as ways:
        for way, run in ways.items():
            what = f"{name} {batch} × {length} + {num_steps} against transformers' {way}"
            try:
                run()
                started = time.perf_counter()
                run()
                other = time.perf_counter() - started
            except Exception as error:  # the other way may work
                yield Figure(what, f"failed: {type(error).__name__}: {one_line(error)}", targets[way])
            else:
                rates = (f"{batch * num_steps / seconds:,.0f}" for seconds in (own, other))
                yield Figure(what, f"{other / own:.1f}× ({' against '.join(rates)} tok/s)", targets[way])


@contextmanager
def ways_of_transformers(
    card: Card, folder: Path, prompts: list[list[int]], num_steps: int
) -> Iterator[dict[str, Callable[[], object]]]:
    """transformers' two ways to generate; each ends with its tokens on the host."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device(card.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    generation = transformers.GenerationConfig(
        max_new_tokens=num_steps, min_new_tokens=num_steps, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ids = torch.tensor(prompts, device=card.device)

    def generate() -> object:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation).cpu()
        assert out.shape[1] == ids.shape[1] + num_steps, f"{out.shape[1] - ids.shape[1]} tokens instead of {num_steps}"
        return out

    options: dict[str, Any] = {}
    if "persistent_manager" in signature(model.generate_batch).parameters:
        options["persistent_manager"] = True  # its KV cache and graphs are made once, like an engine's
    if CONTINUOUS_BATCHING:
        options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(**CONTINUOUS_BATCHING)

    def generate_batch() -> object:
        outputs = model.generate_batch(inputs=prompts, generation_config=generation, **options)
        lengths = [len(output.generated_tokens) for output in outputs.values()]
        assert lengths == [num_steps] * len(prompts), f"{lengths} tokens instead of {num_steps} each"
        return outputs

    try:
        yield {"generate": generate, "generate_batch": generate_batch}
    finally:
        if "persistent_manager" in options:
            model.destroy_cached_continuous_batching_manager()


def measurements(card: Card, folder: Path, only: Sequence[str] = ()) -> Iterator[Measurement]:
    """All measurements, or those whose name begins with one of `only`. Their seconds are generous guesses for an
    H100."""
    rates: list[float] = []
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn

    def measure_ceilings() -> Iterator[Figure]:
        rates.extend(ceilings(card))
        yield Figure("copy rate", f"{rates[0] / 1e12:.2f} TB/s")
        yield Figure("matrix rate, bf16", f"{rates[1] / 1e12:.0f} TFLOP/s")

    def shape(name: str) -> Path:
        return write_shape(folder / name, SHAPES[name])

    listed = [
        Measurement("decode attention", 60, lambda: decode_figures(card, rates[0], LARGE_DECODE, bf16, gathers=True)),
        Measurement("ragged decode", 15, lambda: ragged_figures(card)),
        Measurement("prefill attention", 20, lambda: prefill_figures(card, rates[1])),
        *(
            Measurement(f"{name} engine", seconds, partial(model_figures, card, name, shape(name)))
            for name, seconds in (("0.6B", 60), ("8B", 120))
        ),
        *(
            Measurement(f"transformers {name}", seconds, partial(transformers_figures, card, name, shape(name)))
            for name, seconds in (("0.6B", 50), ("8B", 60))
        ),
        Measurement("flashinfer", 60, lambda: flashinfer_figures(card)),
        Measurement("shared prefixes", 15, lambda: sharing_figures(card)),
        Measurement("small kernels", 15, lambda: small_figures(card, rates[0])),
        Measurement("small decode", 15, lambda: decode_figures(card, rates[0], SMALL_DECODE, bf16)),
        Measurement("fp8 decode", 20, lambda: decode_figures(card, rates[0], LARGE_DECODE + SMALL_DECODE, fp8)),
    ]
    yield Measurement("ceilings", 5, measure_ceilings)
    yield from (each for each in listed if not only or each.name.startswith(tuple(only)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one GPU; targets and limits are an H200's.")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="only measurements whose names begin with one of these"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="start no measurement that would end later")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file for the rows as they come")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: not measured")
        return
    for note in use_sources():
        print(note)
    card = Card()
    table = Table(f"{card.name}; targets and limits are an H200's", options.output)
    with tempfile.TemporaryDirectory() as folder:
        chosen = measurements(card, Path(folder), options.only)
        measure_all(chosen, table, 60 * options.minutes, clean_up=card.clean_up)
    print(f"kept in {options.output}")


if __name__ == "__main__":
    main()
