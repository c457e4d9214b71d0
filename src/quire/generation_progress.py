"""The progress bar of `LLM.generate`. It counts tokens, so it moves long before the first request ends."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from quire.outputs import RequestOutput

Advance = Callable[[Sequence[RequestOutput]], None]


class Progress:
    """Tokens and ended requests of one batch."""

    def __init__(self, most_tokens: Mapping[str, int]) -> None:
        """`most_tokens`: request id → the most tokens that it generates."""
        self._most_tokens = most_tokens
        self._generated: dict[str, int] = {}
        self._ended: set[str] = set()
        self.total = sum(most_tokens.values())
        self.done = 0
        """Tokens generated, and those that an ended request will not generate."""

    @property
    def num_tokens(self) -> int:
        return sum(self._generated.values())

    def advance(self, outputs: Sequence[RequestOutput]) -> None:
        """Count the outputs of a step."""
        for output in outputs:
            name, most = output.request_id, self._most_tokens[output.request_id]
            before = most if name in self._ended else min(most, self._generated.get(name, 0))
            self._generated[name] = sum(len(completion.token_ids) for completion in output.outputs)
            if output.finished:
                self._ended.add(name)
            self.done += (most if output.finished else min(most, self._generated[name])) - before

    def describe(self, seconds: float) -> str:
        """Requests, tokens and rate as a text."""
        rate = f", {self.num_tokens / seconds:,.0f} tok/s" if seconds else ""
        return f"{len(self._ended)}/{len(self._most_tokens)} requests, {self.num_tokens:,} tokens{rate}"


@contextlib.contextmanager
def show_progress(most_tokens: Mapping[str, int], *, shown: bool) -> Iterator[Advance]:
    """A bar if standard error is a terminal. Yields what takes the outputs of each step."""
    if not shown or not sys.stderr.isatty():
        yield lambda outputs: None
        return
    from rich.console import Console  # only if a bar is shown
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("generating"), BarColumn(), TextColumn("{task.fields[about]}"), TimeRemainingColumn())
    progress = Progress(most_tokens)
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=progress.total, about=progress.describe(0))

        def advance(outputs: Sequence[RequestOutput]) -> None:
            progress.advance(outputs)
            bar.update(task, completed=progress.done, about=progress.describe(bar.tasks[task].elapsed or 0.0))

        yield advance
