"""DecodeGraphs: decode steps captured as CUDA graphs once their kind has come often, and replayed from then on.

Launching a model's kernels one by one takes the host longer than a GPU needs to run them for few sequences. A step in
which every sequence computes one token, or a few draft tokens with it, makes the same launches every time; only its
numbers differ. So it is recorded once for each of a few sizes, over inputs in fixed memory, and then launched as a
whole, down to the sampled tokens. A step is padded to the next size: padding writes nothing, and its results are
ignored.

Only the attention plan says which token belongs to which sequence, and it is an input like the others. So 3 sequences
with 5 draft tokens are a step of 8 tokens, just as 8 sequences are. Both are one kind if the attention program holds as
many rows for either: drafts of some length add a kind only where the heads that share a KV head, times the tokens,
outgrow a tile (16, 32, 64, 128 rows). No step is padded to its longest draft times its sequences.

Nothing is captured at start, and nothing inside a step: steps run kernel by kernel until one of their kind is captured,
between two steps or when there is nothing to do. A capture takes some tens of milliseconds. So there is at most one
between two steps, and all captures take at most a small share of the time in which requests run.
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
"""Captures take at most this share of the time in which requests run."""
MAX_GRAPHS = 64
"""Graphs kept at once. There could be some hundreds of kinds, and each graph takes memory for its launches."""


class Outcome(IntEnum):
    """What a captured step returns."""

    LOGITS = 0
    TOKENS = 1
    LOGPROBS = 2
    """Tokens, and log-probabilities for the rows that ask for them."""


class GraphKey(NamedTuple):
    """A kind of step: the same kernels over the same shapes."""

    size: int
    """Tokens it has room for."""
    variant: Variant
    """The variant of its attention plan (`AttentionPlan.variant`)."""
    outcome: Outcome


PrepareStep = Callable[[GraphKey, Mapping[str, Tensor]], Callable[[], Tensor]]
"""Plans a step of a kind over inputs [size], and returns the function that launches it. That one returns samples
[any, size] or logits [size, vocab_size]."""


class Graph(Protocol):
    """A captured run."""

    def replay(self) -> None: ...


class Capture(Protocol):
    def __call__(self, run: Callable[[], Tensor], *, first: bool) -> tuple[Graph, Tensor]:
        """Runs once and records a second run. Returns the graph, and the tensor that every replay writes its result to.
        `first`: no graph captured before will be replayed again."""
        ...


def graph_sizes(max_num_tokens: int) -> list[int]:
    """Sizes worth a graph: padding wastes at most half of a small step and a ninth of a large one."""
    largest = min(max_num_tokens, MAX_CAPTURED_TOKENS)
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, MAX_CAPTURED_TOKENS, 32)]
    return [*(size for size in sizes if size < largest), largest]


class DecodeGraphs:
    """The graphs of one model, and the memory of their inputs."""

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
        """`padding` names the inputs of a step and gives the values of a token that is not there: computing it must
        change nothing. `prepare_step` is called for captures alone, over inputs that are all padding."""
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
        """The size to plan a decode step for; 0: none is large enough."""
        return next((size for size in self._sizes if size >= num_tokens), 0)

    def count_step(self, key: GraphKey) -> bool:
        """Count a step of this kind, which is about to run. True if it can be replayed."""
        self._num_steps[key] += 1
        return key in self._graphs

    def replay(self, key: GraphKey, inputs: Arrays) -> Tensor:
        """inputs [T], T ≤ size -> the result, padding included. The next replay overwrites it."""
        self._inputs.send(inputs)
        graph, result = self._graphs[key] = self._graphs.pop(key)  # the most recently replayed comes last
        graph.replay()
        return result

    @property
    def has_pending_capture(self) -> bool:
        """True if there is something to capture."""
        return self._next_key() is not None

    def capture_one(self, *, idle: bool) -> None:
        """Capture the most frequent kind that has no graph; unless `idle`, only if the last capture is long enough ago.

        Raises PyTorch's error if it fails. After a lack of memory (`is_out_of_memory`) no step of this size or above is
        tried again; after any other error none at all. Such steps run without graphs.
        """
        key = self._next_key()
        started = self._clock()
        if key is None or (not idle and started < self._next_capture):
            return
        first = not self._graphs
        if first:
            # Largest first: later graphs that need no more memory use the same again.
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
            self.clear()
            raise
        finished = self._clock()
        self._next_capture = finished + (finished - started) * (1 / CAPTURE_SHARE - 1)

    def clear(self) -> None:
        """Free the memory of all graphs. Their kinds are captured again when they have come often again."""
        self._graphs.clear()
        self._num_steps.clear()
        self._logits = None

    def _next_key(self) -> GraphKey | None:
        often = [
            (count, key)
            for key, count in self._num_steps.items()
            if count >= EAGER_STEPS and key not in self._graphs and key.size in self._sizes
        ]
        return max(often)[1] if often else None

    def _keep(self, logits: Tensor) -> Tensor:
        """Copy logits to memory that all graphs share. Otherwise each graph would keep its own."""
        if self._logits is None:  # true in the run that is not recorded
            self._logits = logits.new_empty(self._sizes[-1], logits.shape[1])
        return self._logits[: len(logits)].copy_(logits)


def is_out_of_memory(error: RuntimeError) -> bool:
    """True if a device had too little memory. PyTorch's allocator raises a type of its own. Others that allocate
    (Triton's launcher, cuBLAS, pinned memory) only say it in the text."""
    text = str(error)
    says_so = "out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text
    return isinstance(error, torch.OutOfMemoryError) or says_so


class CudaCapture:
    """Captures on a CUDA device. All graphs share one pool of memory, since no two run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], Tensor], *, first: bool) -> tuple[Graph, Tensor]:
        run()  # compiles kernels, and lets libraries make their first allocations
        if first:
            # PyTorch refuses to capture into a pool whose graphs are gone while some tensor still lies in it.
            self._pool = torch.cuda.graph_pool_handle()
        # Not `torch.cuda.graph`: it waits for the device and empties PyTorch's memory caches, which serving needs.
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # PyTorch keeps a cuBLAS workspace per stream for good. Allocated now, it does not keep the pool alive.
            operand = torch.zeros(16, 16, dtype=torch.float16, device="cuda")
            torch.mm(operand, operand)
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = run()
            except BaseException:
                with suppress(RuntimeError):  # the first error is the one to raise
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, result
