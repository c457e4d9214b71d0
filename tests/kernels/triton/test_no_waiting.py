"""No step waits for its device, shown without one: the device is torch's `meta`, of which nothing can be read, and what
would make the host wait on a GPU is noted (reads of values, shapes that depend on values, copies that block)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from quire.attention import plan_buffers
from quire.engine.core import EngineCore
from quire.kernels import transfer
from quire.request import Request
from quire.runner import results
from quire.runner.cuda_graphs import DecodeGraphs
from quire.sampling_params import SamplingParams
from tests.kernels.triton.test_steps import make_core

META = torch.device("meta")
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount"}
"""Operations whose result, or its size, the host must read."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are left out in Triton's interpreter alone")


class Watch(TorchDispatchMode):
    """Notes what would wait."""

    def __init__(self, staged: set[int]) -> None:
        super().__init__()
        self.staged = staged
        self.num_copies = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(x.device == META for x in tensors)
        if on_device and (
            name in WAITING or (name.startswith("index") and any(x.dtype == torch.bool for x in tensors))
        ):
            self.waits.append(name)
        if name in ("_to_copy", "copy_"):
            source = args[-1] if name == "copy_" and len(args) == 2 else args[1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else kwargs.get("device") or source.device
            blocks = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if source.device.type == "cpu" and target == META:
                self.num_copies += 1
                pinned = any(start == source.untyped_storage().data_ptr() for start in self.staged)
                if blocks or not pinned:
                    self.waits.append(f"{name} to the device, non_blocking={not blocks}, pinned={pinned}")
            elif source.device == META and target.type == "cpu":
                self.waits.append(f"{name} to the host")
        return func(*args, **kwargs)


class NoTensorFromLists(TorchFunctionMode):
    """`torch.tensor(values, device=...)` copies from memory that is not pinned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            assert torch.device(kwargs["device"]).type == "cpu", "torch.tensor on the device waits for it"
        return func(*args, **kwargs)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    staged: set[int] = set()
    kept: list[Tensor] = []  # so that no address comes twice
    stage = transfer.staged

    def noted(array: Any, device: torch.device) -> Tensor:
        tensor = stage(array, device)
        kept.append(tensor)
        staged.add(tensor.untyped_storage().data_ptr())
        return tensor

    monkeypatch.setattr(transfer, "staged", noted)
    monkeypatch.setattr(plan_buffers, "staged", noted)
    with Watch(staged) as watch, NoTensorFromLists():
        yield watch


def test_the_watch_sees_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(4, 3, device=META)
    waiting: list[Callable[[], object]] = [
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: x.cpu(),
        lambda: bool((x > 0).any()),
        lambda: torch.zeros(3).to(META),
        lambda: torch.zeros(3).to(META, non_blocking=True),
        lambda: x[0].copy_(torch.zeros(3)),
    ]
    with watched(monkeypatch) as watch:
        for count, each in enumerate(waiting, start=1):
            with suppress(RuntimeError, NotImplementedError):
                each()
            assert len(watch.waits) == count, (count, watch.waits)
        transfer.to_device(np.zeros(3), META)
        transfer.send({"a": np.zeros(3), "b": np.zeros(2)}, META)
        assert len(watch.waits) == len(waiting)
        with pytest.raises(AssertionError, match="on the device waits"):
            torch.tensor([1], device=META)


def run(core: EngineCore, requests: list[Request]) -> int:
    for request in requests:
        core.add(request)
    num_steps = 0
    while core.has_work or core.has_idle_work:
        core.step()
        num_steps += 1
    return num_steps


def requests_of(round_: int) -> list[Request]:
    """Prompts in chunks, samples that part and copy their blocks, every way to draw."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "n": 3},
        {"temperature": 0.8, "top_k": 20, "min_p": 0.1},
        {"temperature": 1.2, "top_p": 0.7, "logprobs": 3, "prompt_logprobs": 2},
    ]
    return [
        Request(
            request_id=f"{round_}-{index}",
            prompt_token_ids=[(7 * place) % 300 for place in range(20 + 60 * index)],
            params=SamplingParams(**kind, seed=index, max_tokens=12, ignore_eos=True),
            max_tokens=12,
        )
        for index, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_no_step_waits_for_its_device(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=4))
    fetched = []

    def fetch(drawn: Tensor) -> Callable[[], np.ndarray]:
        fetched.append(drawn)
        return lambda: np.zeros(drawn.shape, dtype=np.int32)

    monkeypatch.setattr(results, "fetch", fetch)
    replays = []
    replay = DecodeGraphs.replay
    monkeypatch.setattr(
        DecodeGraphs, "replay", lambda self, key, inputs: replays.append(key) or replay(self, key, inputs)
    )
    core = make_core(backend, META, captures=backend == "triton")
    with watched(monkeypatch) as watch:
        num_steps = sum(run(core, requests_of(round_)) for round_ in range(2))
    assert watch.waits == []
    assert len(fetched) > 20
    if backend == "triton":
        assert len(replays) > 5
        # Two to a step, its inputs and its attention's plan; some steps copy blocks, or let samples part.
        assert watch.num_copies < 2.5 * num_steps
