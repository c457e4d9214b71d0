"""Question: one deployment that `quire plan` is asked about, and its figures. An alternative replaces a field of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quire.cli.peak_resident import peak_resident
from quire.cli.plan_options import OUTPUT, PROMPT, PlanOptions
from quire.config import EngineConfig
from quire.engine.checkpoint import BUNDLED_NAME, bundled_folder
from quire.engine.device import Device as EngineDevice
from quire.engine.memory_plan import MemoryPlan, plan_memory
from quire.errors import ConfigError, MemoryPlanError
from quire.model_config import ModelConfig
from quire.quantization import METHODS
from quire.simulation.devices import DEVICES, Device, fewest_devices
from quire.simulation.model_shapes import ModelShape
from quire.simulation.planner import EngineSizes, expect_trace, expect_users
from quire.simulation.trace import find_trace, read_trace

OnStep = Callable[[str], None]
"""Called with what is simulated next."""

_COMPARED = ("RTX-4090", "L40S", "A100-80GB", "H100", "H200")
"""Cards that a plan is compared with."""
_SMALLER_KV = {"int8 KV": "int8", "fp8 KV": "fp8_e4m3"}
_MAX_SHOWN_REMEDIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One deployment to plan."""

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
        return BUNDLED_NAME if self.folder == bundled_folder().resolve() else self.folder.name

    def shape(self, plan: MemoryPlan) -> ModelShape:
        """The model as a plan stores it: a checkpoint of few bits takes less than its parameters in `dtype` would."""
        shape = ModelShape.of(
            self.model, self.name, dtype=plan.dtype, kv_dtype=plan.kv_cache_dtype, quantization=plan.quantization
        )
        return replace(shape, weight_share=plan.weights / self.model.spec.weight_bytes(plan.dtype, plan.quantization))

    def num_shared(self) -> int:
        """Devices that share the model."""
        if self.device is None:
            return 1
        if self.num_devices is not None or self.device.is_host:
            return self.num_devices or 1
        dtype = None if self.config.dtype == "auto" else self.config.dtype
        shape = ModelShape.of(self.model, self.name, dtype=dtype, quantization=self.config.quantization)
        return fewest_devices(shape, self.device)

    def memory_plan(self) -> MemoryPlan:
        """The plan that the engine would make on the device."""
        config, device = self.config, self.device
        if device is None:
            return plan_memory(config, self.model, self.available)
        if device.is_host:
            available = int(self.num_shared() * (device.memory - device.process_memory))
            return plan_memory(replace(config, device="cpu"), self.model, available)
        total = int(self.num_shared() * device.memory)
        card = EngineDevice("cuda", device.name, total, device.capability, is_here=False)
        return plan_memory(config, self.model, device=card)

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

    def lengths(self, longest: int) -> tuple[int, int, int]:
        """Tokens of a prompt, of an answer, and that a user holds: both, unless --context says more."""
        asked = self.asked
        context = asked.context or longest
        if context > longest:
            raise ConfigError(f"context is {context}, but the longest context is {longest} tokens; ask for less")
        output = asked.output or max(1, min(OUTPUT, (context - (asked.prompt or 0)) // (1 if asked.prompt else 4)))
        prompt = asked.prompt or max(1, min(PROMPT, context - output))
        if prompt + output > context:
            raise ConfigError(
                f"prompt is {prompt} and output {output}, together more than the context of {context} tokens; ask for "
                "less"
            )
        return prompt, output, asked.context or prompt + output


def figures_of(question: Question, on_step: OnStep) -> dict[str, Any]:
    """All figures of a plan, ready for JSON. Raises `MemoryPlanError`, with what would fit, if the model does not."""
    asked = question.asked
    try:
        plan = question.memory_plan()
    except MemoryPlanError as error:
        raise MemoryPlanError(f"{error}{_what_would_fit(question)}") from error
    sizes = question.sizes(plan)
    prompt, output, context = question.lengths(plan.max_model_len)
    most = sizes.num_users(context)
    if asked.users is not None and asked.users > sizes.max_num_seqs:
        raise ConfigError(f"users is {asked.users}, but at most {sizes.max_num_seqs} run at once; raise max_num_seqs")
    device, count = question.device, question.num_shared()
    process = int(device.process_memory) if device is not None else 0
    on_cpu = plan.device == "cpu"
    figures: dict[str, Any] = {
        **plan.to_dict(),
        "model": question.name,
        "device": device.name if device else None,
        "device_source": device.source if device else None,
        "num_devices": count,
        "planned_only": count > 1,
        "kv_bytes_per_1k_tokens": 1000 * plan.kv_bytes_per_token,
        "peak_resident": peak_resident(plan, question.model, question.folder, process) if on_cpu else None,
        "prompt": prompt,
        "output": output,
        "context": context,
        "users_that_fit": most,
        "users_by_memory": sizes.num_users(context, of_memory=True),
        "expected": [],
    }
    if device is not None:
        figures["expected"] = list(_expectations(question, plan, most, on_step))
    if asked.compare:
        lines = [("as planned", question), *_alternatives(question)]
        figures["alternatives"] = []
        for name, other in lines:
            on_step(name)
            figures["alternatives"].append(_alternative(name, other, (prompt, output, context)))
    return figures


def _expectations(question: Question, plan: MemoryPlan, most: int, on_step: OnStep) -> Iterator[dict[str, Any]]:
    """Times of a trace, or of several numbers of users."""
    asked, device, count = question.asked, question.device, question.num_shared()
    assert device is not None
    sizes, shape = question.sizes(plan), question.shape(plan)
    if asked.trace:
        on_step(asked.trace)
        yield expect_trace(read_trace(find_trace(asked.trace, ".")), shape, device, count, sizes)
        return
    prompt, output, _ = question.lengths(plan.max_model_len)
    numbers = [asked.users] if asked.users else [4**power for power in range(8) if 4**power < most] + [most]
    for number in filter(None, numbers):
        on_step(f"{number} users")
        yield expect_users(shape, device, count, sizes, users=number, prompt=prompt, output=output)


def _alternatives(question: Question) -> list[tuple[str, Question]]:
    """Other ways to store or run the model, each with one thing changed."""
    config = question.config
    if question.model.packed_as is not None:
        return []  # packed weights have one form, on one kind of device
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
    stored = f" in {now}" if config.quantization else ""
    others += [
        (name + stored, replace(question, config=dense, device=DEVICES[name], num_devices=None))
        for name in _COMPARED
        if DEVICES[name] != question.device
    ]
    return others


def _alternative(name: str, question: Question, lengths: tuple[int, int, int]) -> dict[str, Any]:
    """One line of the comparison: sizes, and tokens per second with as many users as were asked for or as fit."""
    line: dict[str, Any] = {"name": name}
    prompt, output, context = lengths
    try:
        plan = question.memory_plan()
        sizes = question.sizes(plan)
        fitting = sizes.num_users(min(context, plan.max_model_len))
        users = min(question.asked.users or sizes.max_num_seqs, fitting)
        line |= {
            "num_devices": question.num_shared(),
            "planned_only": question.num_shared() > 1,
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


def _what_would_fit(question: Question) -> str:
    """Other ways to run a model that does not fit, with the users that each has room for, as the end of an error."""
    config, device = question.config, question.device
    others = _alternatives(question)
    if device is not None:
        counts = [2**power for power in range(1, 7) if 2**power > (question.num_devices or 1)]
        more = [(f"{count} × {device.name}", replace(question, num_devices=count)) for count in counts]
        others = [*more, *others] if not device.is_host else others
    if config.max_model_len is not None or config.num_blocks is not None or config.kv_cache_memory is not None:
        freed = replace(config, max_model_len=None, num_blocks=None, kv_cache_memory=None)
        others = [("the KV cache and context that memory allows", replace(question, config=freed)), *others]
    fitting: list[str] = []
    seen_more = False
    for name, other in others:
        is_more = " × " in name
        if len(fitting) == _MAX_SHOWN_REMEDIES or (is_more and seen_more):
            continue
        try:
            plan = other.memory_plan()
            _, _, context = other.lengths(plan.max_model_len)
        except (ConfigError, MemoryPlanError):
            continue
        users = other.sizes(plan).num_users(context)
        if users:
            seen_more |= is_more
            count = "" if is_more or other.num_shared() == 1 else f"{other.num_shared()} × "
            fitting.append(f"{count}{name} ({users} user{'s' * (users != 1)} of {context} tokens)")
    return f". What would fit: {', '.join(fitting)}" if fitting else ""
