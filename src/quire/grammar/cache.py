"""GrammarCache: the compiled grammars of one engine by constraint, bounded in number and bytes.

A background thread compiles.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol
from weakref import WeakValueDictionary

from quire.grammar.compiled import Grammar
from quire.structured_outputs import StructuredOutputsParams


class Compiler(Protocol):
    """The interface of `GrammarCompiler`."""

    def compile(self, constraint: StructuredOutputsParams) -> Grammar: ...


class GrammarCache:
    """Keeps the most recently used grammars: at most `max_grammars`, `max_bytes` in total. Others live while in use.

    `load` makes the compiler for the first grammar. It may raise the errors of `compile`.
    """

    def __init__(self, load: Callable[[], Compiler], max_grammars: int, max_bytes: int) -> None:
        self.num_bytes = 0
        """Bytes of the kept grammars when they were compiled. Use adds cached state that is not counted."""
        self._load = load
        self._max_grammars = max_grammars
        self._max_bytes = max_bytes
        self._sizes: dict[StructuredOutputsParams, int] = {}
        self._compiler: Compiler | None = None
        self._recent: OrderedDict[StructuredOutputsParams, Future[Grammar]] = OrderedDict()
        self._in_use: WeakValueDictionary[StructuredOutputsParams, Grammar] = WeakValueDictionary()
        self._thread: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._recent)

    def compile(self, constraint: StructuredOutputsParams, num_bytes: int = 0) -> "Future[Grammar]":
        """The grammar, compiled once; it takes `num_bytes`. A failure is the future's exception, and is not kept."""
        future = self._recent.get(constraint)
        if future is not None and not (future.done() and (future.exception() is not None or future.result().worn)):
            self._recent.move_to_end(constraint)
            return future
        grammar = self._in_use.get(constraint)
        if grammar is not None and not grammar.worn:
            future = Future()
            future.set_result(grammar)
        else:
            future = self._background().submit(self._compile, constraint)
        self._remove(constraint)
        self._recent[constraint] = future
        self._sizes[constraint] = num_bytes
        self.num_bytes += num_bytes
        while len(self._recent) > self._max_grammars or self.num_bytes > self._max_bytes:
            self._remove(next(iter(self._recent)))
        return future

    def warm(self) -> None:
        """Start loading the compiler, so that the first grammar does not wait for it."""
        self._background().submit(self._load_once)

    def find(self, constraint: StructuredOutputsParams) -> Grammar | None:
        """The grammar if it is compiled and still in memory, else None."""
        grammar = self._in_use.get(constraint)
        if grammar is not None and constraint in self._recent:
            self._recent.move_to_end(constraint)
        return grammar

    def _remove(self, constraint: StructuredOutputsParams) -> None:
        if self._recent.pop(constraint, None) is not None:
            self.num_bytes -= self._sizes.pop(constraint)

    def _compile(self, constraint: StructuredOutputsParams) -> Grammar:
        grammar = self._load_once().compile(constraint)
        self._in_use[constraint] = grammar
        return grammar

    def _load_once(self) -> Compiler:
        if self._compiler is None:
            self._compiler = self._load()
        return self._compiler

    def _background(self) -> ThreadPoolExecutor:
        """One thread is enough: grammars repeat, and compiling takes cores from the model."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="quire-grammar")
        return self._thread
