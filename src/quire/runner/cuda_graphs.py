"""DecodeGraphs: steps of decoding, captured when they have come often and replayed from then on.

Launching a model's kernels one by one takes the host longer than a GPU needs to run them for few sequences. A step in
which every sequence computes one token, or a few drafted ones with it, looks the same every time but for its numbers,
so it is recorded once for each of a few numbers of tokens, over inputs that lie in fixed memory, and launched whole,
down to the drawn tokens. A step is padded to the next size: what is padded writes nothing, and what it computes is
thrown away.

Whose the tokens are is told by the attention plan alone, which is an input like the others. So a step of 3 sequences
with 5 drafted tokens is one of 8 tokens, as is one of 8 sequences, and both are one kind where a program of attention
holds as many rows for either: drafts of a length add a kind only where the heads that share a KV head, times the
tokens, outgrow a tile (16, 32, 64, 128 rows), and no kind of step is as wide as its longest draft times its sequences.

Nothing is captured at start, and never inside a step: steps run kernel by kernel until one of their kind is captured,
which happens between two steps or when there is nothing to do. It takes some tens of milliseconds, so there is at most
one capture between two steps, and all of them take a small share of the time that requests run.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from quire.backends import MAX_CAPTURED_TOKENS
from quire.kernels.interface import Variant
from quire.kernels.transfer import Arrays, FixedArrays

EAGER_STEPS = 4
"""Steps of a kind that run kernel by kernel before it is worth a capture."""
CAPTURE_SHARE = 0.1
"""Of the time in which requests run, what captures take at most."""
MAX_GRAPHS = 64
"""Kept at once. There could be some hundreds of kinds, and each graph takes memory for its launches."""


class Outcome(IntEnum):
    """What a step ends in."""

    LOGITS = 0
    TOKENS = 1
    REPORTS = 2
    """Tokens, and log-probabilities of those that ask for them."""


class GraphKey(NamedTuple):
    """A kind of step: the same kernels over the same shapes."""

    size: int
    """Tokens it has room for."""
    variant: Variant
    """Of the attention plan (`AttentionPlan.variant`)."""
    outcome: Outcome


PrepareStep = Callable[[GraphKey, Mapping[str, Tensor]], Callable[[], Tensor]]
"""Plans a step of a kind over inputs [size], and returns what launches it: what was drawn [any, size], or logits [size,
vocab_size]."""


class Graph(Protocol):
    """A captured run."""

    def replay(self) -> None: ...


class Capture(Protocol):
    def __call__(self, run: Callable[[], Tensor], *, first: bool) -> tuple[Graph, Tensor]:
        """Runs once and records a second run; gives what replays it, and the tensor that every replay writes its result
        to. It is the `first` where no graph that was captured before will be replayed again."""
        ...


def graph_sizes(max_num_tokens: int) -> list[int]:
    """Numbers of tokens worth a graph: padding wastes at most half of a small step and a ninth of a large one."""
    largest = min(max_num_tokens, MAX_CAPTURED_TOKENS)
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, MAX_CAPTURED_TOKENS, 32)]
    return [*(size for size in sizes if size < largest), largest]


class DecodeGraphs:
    """The graphs of one model, and the memory that their inputs lie in."""

    def __init__(
        self,
        prepare_step: PrepareStep,
        capture: Capture,
        *,
        padding: Mapping[str, np.generic],
        max_num_tokens: int,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`padding` names the inputs of a step, with what stands for a token that is not there: computing it must
        change nothing. `prepare_step` is only ever called to capture, over nothing but padding."""
        self._prepare_step = prepare_step
        self._capture = capture
        self._sizes = graph_sizes(max_num_tokens)
        self._inputs = FixedArrays(padding, self._sizes[-1], device)
        self._graphs: dict[GraphKey, tuple[Graph, Tensor]] = {}
        self._num_steps: Counter[GraphKey] = Counter()
        self._clock = clock
        self._next_capture = 0.0
        self._logits: Tensor | None = None

    def size_for(self, num_tokens: int) -> int:
        """The size that a step of decoding is to be planned for; 0: none is large enough."""
        return next((size for size in self._sizes if size >= num_tokens), 0)

    def has(self, key: GraphKey) -> bool:
        """Whether a step of this kind, which is about to run, can be replayed."""
        self._num_steps[key] += 1
        return key in self._graphs

    def replay(self, key: GraphKey, inputs: Arrays) -> Tensor:
        """inputs [T], T ≤ size -> the result of the whole size, overwritten by the next replay."""
        self._inputs.send(inputs)
        graph, result = self._graphs[key] = self._graphs.pop(key)  # the one replayed last comes last
        graph.replay()
        return result

    @property
    def is_wanted(self) -> bool:
        """Whether there is something to capture."""
        return self._wanted() is not None

    def capture_one(self, *, idle: bool) -> None:
        """Capture what came most often and is not there yet; unless `idle`, only if it has been long enough since the
        last time.

        Raises what PyTorch raises if it fails: after a lack of memory (`is_out_of_memory`) nothing of this size or
        above is tried again, and after anything else nothing at all. Steps run without then.
        """
        key = self._wanted()
        started = self._clock()
        if key is None or (not idle and started < self._next_capture):
            return
        first = not self._graphs
        if first:
            # Memory that a graph has let go of is used again by the next one that needs no more.
            key = key._replace(size=self._sizes[-1])
        if len(self._graphs) >= MAX_GRAPHS:
            oldest = next(iter(self._graphs))
            del self._graphs[oldest], self._num_steps[oldest]
        self._inputs.send({})
        run = self._prepare_step(key, self._inputs.first(key.size))
        try:
            keeping = (lambda: self._keep(run())) if key.outcome is Outcome.LOGITS else run
            self._graphs[key] = self._capture(keeping, first=first)
        except RuntimeError as error:
            largest = key.size if is_out_of_memory(error) else 0
            self._sizes = [size for size in self._sizes if size < largest]
            self.forget()
            raise
        finished = self._clock()
        self._next_capture = finished + (finished - started) * (1 / CAPTURE_SHARE - 1)

    def forget(self) -> None:
        """Give back the memory of all graphs; they are captured anew when their kinds have come often again."""
        self._graphs.clear()
        self._num_steps.clear()
        self._logits = None

    def _wanted(self) -> GraphKey | None:
        often = [
            (count, key)
            for key, count in self._num_steps.items()
            if count >= EAGER_STEPS and key not in self._graphs and key.size in self._sizes
        ]
        return max(often)[1] if often else None

    def _keep(self, logits: Tensor) -> Tensor:
        """Logits are copied to memory that all graphs share: each graph's own would stay allocated as long as it."""
        if self._logits is None:  # in the run that is not recorded
            self._logits = logits.new_empty(self._sizes[-1], logits.shape[1])
        return self._logits[: len(logits)].copy_(logits)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had too little memory. PyTorch's allocator tells by the type, who allocates beside it (Triton's
    launcher, cuBLAS, pinned memory) by the text alone."""
    told = "out of memory" in str(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    return isinstance(error, torch.OutOfMemoryError) or told


class CudaCapture:
    """Captures on a CUDA device. All graphs share one pool of memory, as no two run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], Tensor], *, first: bool) -> tuple[Graph, Tensor]:
        run()  # compiles what is not compiled, and lets libraries allocate what they allocate the first time
        if first:
            # PyTorch's allocator lets nobody capture into a pool that all graphs have left and some tensor has not.
            self._pool = torch.cuda.graph_pool_handle()
        # `torch.cuda.graph` would wait for the device and empty PyTorch's caches of memory, which serving goes on with.
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # PyTorch keeps a workspace of cuBLAS for each stream for good: not in the pool, which would never be free.
            operand = torch.zeros(16, 16, dtype=torch.float16, device="cuda")
            torch.mm(operand, operand)
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = run()
            except BaseException:
                with suppress(RuntimeError):  # what broke off is told already
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, result
