"""What adapters cost: `python -m benchmarks.lora MODEL`, a folder of `benchmarks.make_models`.

Decoding of a batch without adapters, on an engine without and with `enable_lora`; with one adapter; and of 64 sequences
with 16 adapters. Adapters have rank 16 and change every dense layer. Figures are ratios of CPU times of all threads,
measured in turns, so that a busy machine hardly counts; each is the median over the turns.

`--registered 1000 --hot 64` measures an engine that knows many adapters and holds some of them instead: requests in
batches of 64, nine of ten for one of the hot ones, the others for any. Without a model it takes the bundled one.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quire import LLM, LoRARequest, SamplingParams
from quire.engine.checkpoint import bundled_folder
from quire.model_config import ModelConfig

RANK = 16
_LARGEST_SEED = 10_000


def write_adapter(folder: Path, config: ModelConfig, seed: int) -> LoRARequest:
    """An adapter of a Llama-like model with random numbers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    attention["o_proj"] = (hidden, queries)
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes = {
        f"base_model.model.model.layers.{layer}.{block}.{name}": shape
        for layer in range(config.num_layers)
        for block, shapes in (("self_attn", attention), ("mlp", mlp))
        for name, shape in shapes.items()
    }
    count = RANK * sum(sum(shape) for shape in shapes.values())
    numbers, tensors = _numbers(count + _LARGEST_SEED)[seed : seed + count], {}
    for place, (outputs, inputs) in shapes.items():
        a, b, numbers = numbers.split([RANK * inputs, RANK * outputs, len(numbers) - RANK * (inputs + outputs)])
        tensors[f"{place}.lora_A.weight"] = a.view(RANK, inputs).clone()
        tensors[f"{place}.lora_B.weight"] = b.view(outputs, RANK).clone()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = {"target_modules": [*attention, *mlp], "r": RANK, "lora_alpha": RANK, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(targets))
    return LoRARequest(folder.name, seed + 1, str(folder))


@cache
def _numbers(count: int) -> Tensor:
    """What adapters are cut from: a thousand of them, each drawn anew, would take longer than the measurement."""
    return (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def decode_seconds(llm: LLM, adapters: Sequence[LoRARequest | None], num_tokens: int) -> float:
    """CPU time of a decoded token of a whole batch: the slope between a short and a long answer."""
    prompts = [{"prompt_token_ids": [3 + number, 5, 8]} for number in range(len(adapters))]
    times = []
    for count in (4, 4 + num_tokens):
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        started = time.process_time()
        llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        times.append(time.process_time() - started)
    return (times[1] - times[0]) / num_tokens


def measure(model: Path, dtype: str, threads: int | None, turns: int, num_tokens: int) -> dict[str, float]:
    config = ModelConfig.from_folder(model)
    options: dict[str, Any] = {
        "dtype": dtype,
        "threads": threads,
        "num_blocks": 600,
        "max_model_len": 256,
        "max_num_seqs": 64,
    }
    with tempfile.TemporaryDirectory() as folder:
        adapters = [write_adapter(Path(folder) / f"a{number}", config, number) for number in range(16)]
        plain, lora = LLM(str(model), **options), LLM(str(model), enable_lora=True, max_loras=16, **options)
        many = [adapters[number % 16] for number in range(64)]
        decode_seconds(lora, many, 1)  # loads them
        nothing: list[LoRARequest | None] = [None]
        cases: dict[str, tuple[int, Sequence[LoRARequest | None]]] = {
            "1 sequence, no adapter": (1, nothing),
            "64 sequences, no adapter": (64, nothing * 64),
            "1 sequence, 1 adapter": (1, [adapters[0]]),
            "64 sequences, 1 adapter": (64, [adapters[0]] * 64),
            "64 sequences, 16 adapters": (64, many),
        }
        ratios: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(turns):
            base = {count: decode_seconds(plain, nothing * count, num_tokens) for count in (1, 64)}
            for name, (count, used) in cases.items():
                ratios[name].append(decode_seconds(lora, used, num_tokens) / base[count])
    return {name: statistics.median(values) for name, values in ratios.items()}


def measure_registered(
    model: Path, num_registered: int, num_hot: int, threads: int | None, turns: int
) -> dict[str, float]:
    """CPU time of 256 requests of 16 tokens each, over that of the same without adapters."""
    config = ModelConfig.from_folder(model)
    options: dict[str, Any] = {"threads": threads, "max_num_seqs": 64, "max_model_len": 256, "num_blocks": 800}
    draw = random.Random(0)
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        adapters = [write_adapter(Path(folder) / f"a{number}", config, number) for number in range(num_registered)]

        def seconds(llm: LLM, used: Sequence[LoRARequest | None]) -> float:
            prompts = [{"prompt_token_ids": [3 + draw.randrange(200) for _ in range(24)]} for _ in used]
            started = time.process_time()
            llm.generate(prompts, params, use_tqdm=False, lora_request=used)
            return time.process_time() - started

        def mixed() -> list[LoRARequest | None]:
            return [adapters[draw.randrange(num_hot if draw.random() < 0.9 else num_registered)] for _ in range(256)]

        lora = LLM(str(model), enable_lora=True, max_loras=num_hot, **options)
        seconds(lora, list(adapters[:num_hot]))
        kinds: dict[str, Callable[[], list[LoRARequest | None]]] = {
            f"{num_hot} hot adapters": lambda: [adapters[number % num_hot] for number in range(256)],
            f"{num_registered} adapters, {num_hot} hot": mixed,
        }
        ratios: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(turns):
            base = seconds(lora, [None] * 256)
            for name, make in kinds.items():
                ratios[name].append(seconds(lora, make()) / base)
    return {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=bundled_folder())
    parser.add_argument("--registered", type=int, help="measure an engine that knows so many adapters")
    parser.add_argument("--hot", type=int, default=64, help="adapters in memory")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, help="also write the figures to this file, as JSON")
    arguments = parser.parse_args()
    if arguments.registered:
        found = measure_registered(
            arguments.model, arguments.registered, arguments.hot, arguments.threads, arguments.turns
        )
    else:
        found = measure(arguments.model, arguments.dtype, arguments.threads, arguments.turns, arguments.tokens)
    print("CPU time over that without adapters")
    for name, ratio in found.items():
        print(f"  {name:28}{ratio:8.3f}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
