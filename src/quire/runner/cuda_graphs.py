"""DecodeGraphs: steps of decoding, captured when they have come often and replayed from then on.

Launching a model's kernels one by one takes the host longer than a GPU needs to run them for few sequences. A step in
which every sequence computes one token looks the same every time but for its numbers, so it is recorded once for each
of a few batch sizes, over inputs that lie in fixed memory, and launched whole. A batch is padded to the next size:
what is padded writes nothing, and what it computes is thrown away.

Nothing is captured at start. The first steps of a size run kernel by kernel, so that the first request waits for
nothing and all kernels are compiled by then; the next one is captured, which costs it some tens of milliseconds.
"""

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from quire.kernels.interface import AttentionPlan

EAGER_STEPS = 4
"""Steps of a size that run kernel by kernel before it is captured."""

RunModel = Callable[[Tensor, Tensor, AttentionPlan], Tensor]
"""input_ids, positions int32 [P], plan -> logits [P, vocab_size]"""


class Graph(Protocol):
    """A captured run."""

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]
"""Records a run; gives what replays it, and the tensor that every replay writes its result to."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph: padding wastes at most half of a small batch and a ninth of a large one."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 512, 32)]
    sizes = [size for size in sizes if size < max_num_seqs]
    return [*sizes, max_num_seqs] if max_num_seqs <= 512 else [*sizes, 512]


class DecodeGraphs:
    """The graphs of one model, by batch size, and the memory that their inputs lie in."""

    def __init__(self, run_model: RunModel, capture: Capture, *, max_num_seqs: int, device: torch.device) -> None:
        self._run_model = run_model
        self._capture = capture
        self._sizes = graph_sizes(max_num_seqs)
        self._input_ids = torch.zeros(self._sizes[-1], dtype=torch.int32, device=device)
        self._positions = torch.zeros(self._sizes[-1], dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[Graph, Tensor]] = {}
        self._num_steps: Counter[int] = Counter()

    def size_for(self, num_seqs: int) -> int:
        """The batch size that a step of decoding is to be planned for and given to `run`; 0: run it without a graph."""
        size = next((size for size in self._sizes if size >= num_seqs), 0)
        self._num_steps[size] += 1
        return size if self._num_steps[size] > EAGER_STEPS else 0

    def run(self, size: int, input_ids: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """input_ids, positions int32 [B], a plan made for `size` ≥ B sequences -> logits [B, vocab_size].

        The logits may be overwritten, and are by the next run.
        """
        num_seqs = len(input_ids)
        for fixed, given in ((self._input_ids, input_ids), (self._positions, positions)):
            fixed[:num_seqs].copy_(given)
            fixed[num_seqs:size].zero_()
        if size not in self._graphs:
            fixed_ids, fixed_positions = self._input_ids[:size], self._positions[:size]
            self._graphs[size] = self._capture(lambda: self._run_model(fixed_ids, fixed_positions, plan))
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:num_seqs]

    def forget(self) -> None:
        """Give back the memory of all graphs; they are captured anew when their sizes have come often again."""
        self._graphs.clear()
        self._num_steps.clear()


class CudaCapture:
    """Captures on a CUDA device. All graphs share one pool of memory, as no two run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        # Once without recording, on a stream of its own: libraries allocate what they allocate the first time.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        return graph, result
