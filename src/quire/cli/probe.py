"""Probe: times steps of known work on this machine, through the real engine, for `quire plan --measure`.

It runs models of random weights. Two shapes have matrices larger than the caches; two are needed to tell the cost of a
layer from the cost of a parameter. They are stored in every way that the engine has. A third shape has large keys and
values, and small matrices. In each run a few sequences of one length compute their prompts in the first step and decode
in the next ones. All runs are done twice, some time apart, because the speed of a machine varies.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from quire.model_config import ModelConfig
from quire.quantization import METHODS
from quire.sampling_params import SamplingParams
from quire.simulation.calibration import TimedStep, fit_device
from quire.simulation.devices import Device
from quire.simulation.model_shapes import ModelShape

DTYPES = ("float32", "bfloat16", "float16")
MAX_STEP_TOKENS = 512
NUM_DECODING = 6
"""Steps of decoding per batch; the median of their times counts."""
NUM_PASSES = 2
"""How often every run is done."""
_BATCHES = ((1, 64), (2, 64), (4, 32), (8, 16), (16, 16), (32, 8), (64, 8), (1, 512))
"""(sequences, tokens of each prompt): steps of decoding, and the first step if it computes all prompts."""
_LONG_BATCHES = ((1, 512), (4, 512), (16, 256), (64, 256), (64, 64), (64, 8))
_SHAPES = (
    {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "vocab_size": 16384},
    {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "vocab_size": 32768},
)
_LONG_SHAPE = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 4096}
_HEAD_DIM = 64


class SteppingEngine(Protocol):
    """The part of `quire.engine.engine.Engine` used here; importing the class would import torch."""

    def add_request(self, request_id: str, prompt: list[int], params: SamplingParams, /) -> object: ...
    def step(self) -> Sequence[object]: ...
    @property
    def has_work(self) -> bool: ...


def measure_device(name: str, memory: float, threads: int | None, report: Callable[[str], None]) -> Device:
    """Time steps of every kind and fit the coefficients. Takes a minute or two, in which nothing else should run."""
    from quire.config import EngineConfig
    from quire.engine.checkpoint import bundled_folder
    from quire.engine.engine import Engine

    steps: list[TimedStep] = []
    process_memory = 0.0
    ways: list[tuple[str, str | None]] = [(dtype, None) for dtype in DTYPES]
    jobs: list[tuple[dict[str, int], tuple[str, str | None], Sequence[tuple[int, int]]]]
    jobs = [(shape, way, _BATCHES) for shape in _SHAPES for way in [*ways, *(("bfloat16", name) for name in METHODS)]]
    # Keys and values of 32 and of 16 bits: the rate of reading them hardly depends on anything else.
    jobs += [(_LONG_SHAPE, way, _LONG_BATCHES) for way in ways[:2]]
    with tempfile.TemporaryDirectory() as folder:
        for shape, (dtype, quantization), batches in jobs * NUM_PASSES:
            path = _write_config(Path(folder), shape)
            config = EngineConfig(
                model=str(path),
                tokenizer=str(bundled_folder()),
                load_format="dummy",
                dtype=dtype,
                quantization=quantization,
                max_model_len=1024,
                max_num_seqs=64,
                max_num_batched_tokens=MAX_STEP_TOKENS,
                num_blocks=4096,
                enable_prefix_caching=False,
                threads=threads,
            )
            engine = Engine(config, lambda line: None)
            process_memory = process_memory or _resident() - engine.memory_plan.weights
            model = ModelShape.of(ModelConfig.from_folder(path), path.name, dtype=dtype, quantization=quantization)
            steps += time_steps(engine, model, batches)
            engine.close()
            report(f"{model.weight_format}, {model.spec.num_layers} layers: {steps[-1].seconds * 1000:.1f} ms a step")
    return fit_device(steps, name=name, memory=memory, process_memory=process_memory)


def time_steps(engine: SteppingEngine, model: ModelShape, batches: Sequence[tuple[int, int]]) -> Iterator[TimedStep]:
    """For every batch the step that computes the prompts, if it is one step, and a step of decoding."""
    _time(engine, 1, 16)  # costs of a first step
    for count, length in batches:
        prompts, decoding, contexts = [], [], []
        for _ in range(3 if count * length <= 128 else 1):
            first, rest, context = _time(engine, count, length)
            prompts.append(first)
            decoding += rest
            contexts.append(context)
        if count * length <= MAX_STEP_TOKENS:
            yield TimedStep(model, count, length, 0, statistics.median(prompts))
        yield TimedStep(model, count, 1, contexts[0], statistics.median(decoding))


def _time(engine: SteppingEngine, count: int, length: int) -> tuple[float, list[float], int]:
    """Compute `count` prompts of `length` tokens and decode.

    Returns the seconds of the first step, the seconds of the steps in which all sequences decode and nothing else
    happens, and how many tokens a sequence has on average before the middle one of those.
    """
    num_prompt_steps = -(-count * length // (MAX_STEP_TOKENS - count)) if count * length > MAX_STEP_TOKENS else 1
    # The first sequence must not end before the last one has its prompt computed.
    params = SamplingParams(
        max_tokens=num_prompt_steps + NUM_DECODING + 1, ignore_eos=True, detokenize=False, temperature=0.0
    )
    for number in range(count):
        engine.add_request(f"{number}", [3 + (5 * place + number) % 200 for place in range(length)], params)
    seconds: list[float] = []
    gained: list[int] = []
    while engine.has_work:
        started = time.perf_counter()
        outputs = engine.step()
        seconds.append(time.perf_counter() - started)
        gained.append(len(outputs))
    all_gain = gained.index(count) + 1  # earlier steps compute prompts
    context = length + sum(gained[: all_gain + NUM_DECODING // 2]) // count
    return seconds[0], seconds[all_gain : all_gain + NUM_DECODING], context - 1


def _write_config(folder: Path, shape: dict[str, int]) -> Path:
    """A checkpoint's folder without weights."""
    heads = shape["hidden_size"] // _HEAD_DIM
    config = {
        "architectures": ["LlamaForCausalLM"],
        "head_dim": _HEAD_DIM,
        "num_attention_heads": heads,
        "num_key_value_heads": max(4, heads // 4),
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **shape,
    }
    path = folder / "-".join(map(str, shape.values()))
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
