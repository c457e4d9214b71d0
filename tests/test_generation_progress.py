"""The progress of a batch: it moves with each token, and ends at its total."""

from quire.generation_progress import Progress
from quire.outputs import CompletionOutput, RequestOutput


def output(name: str, *lengths: int, finished: bool = False) -> RequestOutput:
    samples = [CompletionOutput(index, token_ids=[7] * length) for index, length in enumerate(lengths)]
    return RequestOutput(name, None, [1], outputs=samples, finished=finished)


def test_tokens_move_it_and_an_early_end_counts_what_is_left() -> None:
    progress = Progress({"a": 10, "b": 20})
    assert (progress.total, progress.done) == (30, 0)
    progress.advance([output("a", 3), output("b", 1, 2)])
    assert progress.done == 6
    assert progress.describe(2.0) == "0/2 requests, 6 tokens, 3 tok/s"
    progress.advance([output("a", 4, finished=True)])
    assert (progress.done, progress.num_tokens) == (13, 7)
    progress.advance([output("b", 10, 10, finished=True)])
    progress.advance([output("b", 10, 10, finished=True)])
    assert progress.done == progress.total
    assert progress.describe(0.0) == "2/2 requests, 24 tokens"
