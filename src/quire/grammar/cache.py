"""GrammarCache: the compiled grammars of one engine, by what was asked for, bounded in number and bytes.

Compiling is done in a thread.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol
from weakref import WeakValueDictionary

from quire.grammar.compiled import Grammar
from quire.structured_outputs import StructuredOutputsParams


class Compiler(Protocol):
    """What makes a grammar: `GrammarCompiler`."""

    def compile(self, form: StructuredOutputsParams) -> Grammar: ...


class GrammarCache:
    """Keeps those that were used last, at most `max_grammars` of `max_bytes` in all; others only while they are in use.

    `load` makes the compiler when the first grammar is asked for; it may raise what `compile` raises.
    """

    def __init__(self, load: Callable[[], Compiler], max_grammars: int, max_bytes: int) -> None:
        self.num_bytes = 0
        """What the kept ones took when they were compiled. Following a grammar adds what is learned of it."""
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

    def compile(self, form: StructuredOutputsParams, num_bytes: int = 0) -> "Future[Grammar]":
        """The grammar, compiled once, which takes `num_bytes`; a failure is the future's exception, and is not kept."""
        future = self._recent.get(form)
        if future is not None and not (future.done() and (future.exception() is not None or future.result().worn)):
            self._recent.move_to_end(form)
            return future
        grammar = self._in_use.get(form)
        if grammar is not None and not grammar.worn:
            future = Future()
            future.set_result(grammar)
        else:
            future = self._background().submit(self._compile, form)
        self._forget(form)
        self._recent[form] = future
        self._sizes[form] = num_bytes
        self.num_bytes += num_bytes
        while len(self._recent) > self._max_grammars or self.num_bytes > self._max_bytes:
            self._forget(next(iter(self._recent)))
        return future

    def warm(self) -> None:
        """Begin to load the compiler, so that the first grammar does not wait for it."""
        self._background().submit(self._load_once)

    def find(self, form: StructuredOutputsParams) -> Grammar | None:
        """The grammar if it is compiled and still known."""
        grammar = self._in_use.get(form)
        if grammar is not None and form in self._recent:
            self._recent.move_to_end(form)
        return grammar

    def _forget(self, form: StructuredOutputsParams) -> None:
        if self._recent.pop(form, None) is not None:
            self.num_bytes -= self._sizes.pop(form)

    def _compile(self, form: StructuredOutputsParams) -> Grammar:
        grammar = self._load_once().compile(form)
        self._in_use[form] = grammar
        return grammar

    def _load_once(self) -> Compiler:
        if self._compiler is None:
            self._compiler = self._load()
        return self._compiler

    def _background(self) -> ThreadPoolExecutor:
        """One thread: compiling shares the cores with the model, and grammars repeat."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="quire-grammar")
        return self._thread
