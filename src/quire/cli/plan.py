"""`quire plan`: what a model would take of the memory and how fast it would be, from its config.json alone."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from quire.backends import DEVICES as DEVICE_TYPES
from quire.cli.options import ModelArgument, flags
from quire.cli.peak_resident import peak_resident
from quire.cli.plan_tables import print_plan
from quire.config import EngineConfig
from quire.engine.checkpoint import find_model
from quire.engine.device import Device as EngineDevice
from quire.engine.memory_plan import MemoryPlan, plan_memory
from quire.engine.memory_sizes import available_memory
from quire.errors import ConfigError, MemoryPlanError
from quire.model_config import ModelConfig
from quire.quantization import METHODS
from quire.simulation.devices import DEVICES, Device, fewest_devices, find_device
from quire.simulation.model_shapes import ModelShape
from quire.simulation.planner import EngineSizes, expect_trace, expect_users
from quire.simulation.trace import find_trace, read_trace

_SMALLER_KV = {"int8 KV": "int8", "fp8 KV": "fp8_e4m3"}
_CAPABILITY = (8, 0)
"""Of the GPUs that are known by name, at least."""
PROMPT, OUTPUT = 512, 128
"""Tokens of a request if not told otherwise, as far as the context reaches."""


@flags(EngineConfig, without=frozenset({"model", "device"}))
def plan(
    model: ModelArgument = "",
    *,
    device: str = "",
    num_devices: int | None = None,
    context: int | None = None,
    users: int | None = None,
    prompt: int | None = None,
    output: int | None = None,
    trace: str = "",
    compare: bool = True,
    measure: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    **options: Any,
) -> None:
    """Show what a model takes of the memory, how many users fit, and how fast it would be, without loading it.

    Parameters
    ----------
    model
        Folder of a Hugging Face checkpoint, or a hub name; the bundled model if left out.
    device
        A100-40GB, A100-80GB, H100, H200, or a file that --measure wrote. Left out, or cpu or cuda: this machine,
        without times.
    num_devices
        Devices that share the model; as few as hold it if left out.
    context
        Tokens that each user holds; the longest context if left out.
    users
        Users at once; several numbers up to what fits if left out.
    prompt
        Tokens of each prompt (512 if left out, or what the context allows).
    output
        Tokens of each answer (128 if left out, or what the context allows).
    trace
        File of request lengths to expect instead, as for `quire simulate`.
    compare
        Show what other ways of storing weights and KV, and other devices, would change.
    measure
        Measure this machine's coefficients (a minute or two, with nothing else running) and write them to this file.
    as_json
        Print the plan as JSON, sizes in bytes, times in seconds.
    """
    here = not device or device in DEVICE_TYPES
    config = EngineConfig.from_options({"model": model, **options, **({"device": device} if here and device else {})})
    if measure is not None:
        _measure(measure, config.threads)
        return
    for name, value in (("context", context), ("users", users), ("prompt", prompt), ("output", output)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    folder = find_model(config.model, config.revision)
    asked = _Asked(
        config,
        ModelConfig.from_folder(folder),
        folder.resolve(),
        available_memory(),
        None if here else find_device(device),
        num_devices,
        context,
        users,
        prompt,
        output,
        trace,
    )
    figures = _figures(asked, compare=compare)
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        print_plan(figures, asked.memory_plan().describe())


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is to be planned; the alternatives replace a field of it."""

    config: EngineConfig
    model: ModelConfig
    folder: Path
    available: int
    """Bytes of this machine's memory, looked up once: all lines tell of the same moment."""
    device: Device | None
    num_devices: int | None = None
    context: int | None = None
    users: int | None = None
    prompt: int | None = None
    output: int | None = None
    trace: str = ""

    @property
    def name(self) -> str:
        return self.folder.name

    def shape(self, plan: MemoryPlan) -> ModelShape:
        """As it is stored by a plan."""
        return ModelShape.of(
            self.model, self.name, dtype=plan.dtype, kv_dtype=plan.kv_cache_dtype, quantization=plan.quantization
        )

    def num_shared(self) -> int:
        """Devices that share the model."""
        if self.device is None:
            return 1
        dtype = None if self.config.dtype == "auto" else self.config.dtype
        shape = ModelShape.of(self.model, self.name, dtype=dtype, quantization=self.config.quantization)
        return self.num_devices or fewest_devices(shape, self.device)

    def memory_plan(self) -> MemoryPlan:
        """As the engine would make it there."""
        config, device = self.config, self.device
        if device is None:
            return plan_memory(config, self.model, self.available)
        if device.is_host:
            available = int(device.memory - device.process_memory)
            return plan_memory(replace(config, device="cpu"), self.model, available)
        total = int(self.num_shared() * device.memory)
        return plan_memory(config, self.model, device=EngineDevice("cuda", device.name, total, _CAPABILITY))

    def sizes(self, plan: MemoryPlan) -> EngineSizes:
        """What the scheduler sees of a plan."""
        return EngineSizes(
            num_blocks=plan.num_blocks,
            block_size=plan.block_size,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
        )


def _figures(asked: _Asked, *, compare: bool) -> dict[str, Any]:
    """All that is known of a plan, ready for JSON."""
    plan = asked.memory_plan()
    shape = asked.shape(plan)
    sizes = asked.sizes(plan)
    context = asked.context or plan.max_model_len
    if context > plan.max_model_len:
        raise ConfigError(f"context is {context}, but the longest context is {plan.max_model_len} tokens; ask for less")
    prompt, output = _lengths(asked, context)
    most = sizes.num_users(context)
    if asked.users is not None and asked.users > sizes.max_num_seqs:
        raise ConfigError(f"users is {asked.users}, but at most {sizes.max_num_seqs} run at once; raise max_num_seqs")
    process = int(asked.device.process_memory) if asked.device is not None else 0
    figures: dict[str, Any] = {
        **plan.to_dict(),
        "model": asked.name,
        "device": asked.device.name if asked.device else None,
        "num_devices": asked.num_shared(),
        "kv_bytes_per_1k_tokens": 1000 * plan.kv_bytes_per_token,
        "peak_resident": peak_resident(plan, asked.model, asked.folder, process) if plan.device == "cpu" else None,
        "context": context,
        "users_that_fit": most,
        "expected": [],
    }
    if asked.device is not None:
        device, count = asked.device, asked.num_shared()
        if asked.trace:
            trace = read_trace(find_trace(asked.trace, "."))
            figures["expected"] = [expect_trace(trace, shape, device, count, sizes)]
        else:
            numbers = [asked.users] if asked.users else [4**power for power in range(8) if 4**power < most] + [most]
            figures["expected"] = [
                expect_users(shape, device, count, sizes, users=number, prompt=prompt, output=output)
                for number in numbers
                if number
            ]
    if compare:
        alternatives = [_alternative("as planned", asked, context, prompt, output)]
        alternatives += [_alternative(name, other, context, prompt, output) for name, other in _others(asked)]
        figures["alternatives"] = alternatives
    return figures


def _lengths(asked: _Asked, context: int) -> tuple[int, int]:
    output = asked.output or max(1, min(OUTPUT, (context - (asked.prompt or 0)) // (1 if asked.prompt else 4)))
    prompt = asked.prompt or max(1, min(PROMPT, context - output))
    if prompt + output > context:
        raise ConfigError(
            f"prompt is {prompt} and output {output}, together more than the context of {context} tokens; ask for less"
        )
    return prompt, output


def _others(asked: _Asked) -> list[tuple[str, _Asked]]:
    """What one could change, one thing at a time."""
    config = asked.config
    now = asked.model.checkpoint_dtype if config.dtype == "auto" else config.dtype
    others = []
    if config.quantization is None and now == "float32":
        others.append(("bfloat16", replace(asked, config=replace(config, dtype="bfloat16"))))
    others += [
        (method, replace(asked, config=replace(config, quantization=method)))
        for method in METHODS
        if method != config.quantization
    ]
    others += [
        (name, replace(asked, config=replace(config, kv_cache_dtype=kv_dtype)))
        for name, kv_dtype in _SMALLER_KV.items()
        if kv_dtype != config.kv_cache_dtype
    ]
    # Layers of few bits are the CPU's alone.
    dense, without = (
        replace(config, quantization=None),
        f" without {config.quantization}" if config.quantization else "",
    )
    others += [
        (name + without, replace(asked, config=dense, device=device, num_devices=None))
        for name, device in DEVICES.items()
        if device != asked.device and not device.is_host
    ]
    return others


def _alternative(name: str, asked: _Asked, context: int, prompt: int, output: int) -> dict[str, Any]:
    """One line of the comparison: what fits, and tokens per second with as many users as fit, or as were asked for."""
    line: dict[str, Any] = {"name": name}
    try:
        plan = asked.memory_plan()
        sizes = asked.sizes(plan)
        users = min(asked.users or sizes.max_num_seqs, sizes.num_users(min(context, plan.max_model_len)))
        line |= {
            "num_devices": asked.num_shared(),
            "weights": plan.weights,
            "kv_bytes_per_1k_tokens": 1000 * plan.kv_bytes_per_token,
            "kv_tokens": sizes.num_blocks * sizes.block_size,
            "users_that_fit": sizes.num_users(min(context, plan.max_model_len)),
            "users": users,
        }
        if asked.device is not None and users:
            expected = expect_users(
                asked.shape(plan), asked.device, asked.num_shared(), sizes, users=users, prompt=prompt, output=output
            )
            line |= {figure: expected[figure] for figure in ("tokens_per_s", "ttft_p50", "tbt_p50")}
    except (ConfigError, MemoryPlanError) as error:
        line["refused"] = str(error)
    return line


def _measure(path: Path, threads: int | None) -> None:
    from quire.cli.probe import measure_device

    if not path.parent.is_dir():
        raise ConfigError(f"measure is {path}, but there is no folder {path.parent}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    device = measure_device(path.stem, memory, threads, lambda line: print(f"measured {line}", flush=True))
    path.write_text(device.to_json())
    print(f"wrote {path}; use it as --device {path}")
