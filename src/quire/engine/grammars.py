"""Grammars of one model: its compiler, and the requests that wait for their grammar."""

from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from pathlib import Path

from quire.config import EngineConfig
from quire.engine.checkpoint import tokenizer_folder
from quire.errors import CheckpointError, RequestError
from quire.grammar.cache import Compiler, GrammarCache
from quire.grammar.compiled import Grammar
from quire.model_config import ModelConfig
from quire.request import Request

WAIT_SECONDS = 0.05
"""Longest wait for a grammar in a step without other work; then messages are read again."""


def load_compiler(config: EngineConfig, model_config: ModelConfig, folder: Path) -> Compiler:
    """The compiler for a model's tokens. Raises `RequestError` if the model has no tokenizer."""
    folder = tokenizer_folder(config, folder)
    return read_compiler(folder, vocab_size=model_config.vocab_size, eos_token_ids=model_config.eos_token_ids)


def read_compiler(folder: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Compiler:
    """The compiler for the tokenizer in `folder`. Raises `RequestError` if there is none."""
    from quire.grammar.compiler import GrammarCompiler  # imports llguidance, which only structured output needs

    path = folder / "tokenizer.json"
    if path.is_file() and eos_token_ids:  # as for most models
        content = path.read_text(encoding="utf-8")
        return GrammarCompiler(content, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
    from quire.engine.tokenizer import Tokenizer  # imports a library that the engine process otherwise does without

    try:
        tokenizer = Tokenizer.from_folder(folder)
    except CheckpointError as error:
        raise RequestError(
            f"structured output needs the model's tokenizer: {error}", param="structured_outputs", code="not_available"
        ) from error
    if not eos_token_ids and tokenizer.eos_token_id is not None:
        eos_token_ids = (tokenizer.eos_token_id,)
    content = path.read_text(encoding="utf-8") if path.is_file() else tokenizer.to_json()
    return GrammarCompiler(content, vocab_size=vocab_size, eos_token_ids=eos_token_ids)


class WaitingForGrammar:
    """Requests whose grammar is being compiled, and the grammars of running requests.

    Holding a running request's grammar here keeps it available even after the cache has evicted it.
    """

    def __init__(self, cache: GrammarCache) -> None:
        self._cache = cache
        self._compiling: dict[str, tuple[Request, Future[Grammar]]] = {}
        self._held: dict[str, Grammar] = {}

    def __len__(self) -> int:
        return len(self._compiling)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._compiling

    def add(self, request: Request) -> None:
        """Begin to compile; `take` returns the request when that is done."""
        spec = request.params.structured_outputs
        assert spec is not None
        self._compiling[request.request_id] = (request, self._cache.compile(spec, request.grammar_bytes))

    def abort(self, request_id: str) -> None:
        """Remove a request. The cache keeps the grammar that is being compiled."""
        self._compiling.pop(request_id, None)
        self._held.pop(request_id, None)

    def take(self, *, block: bool) -> list[tuple[Request, RequestError | None]]:
        """Requests whose grammar is compiled or has failed. With `block`, wait up to `WAIT_SECONDS` for one."""
        if block and self._compiling:
            wait([future for _, future in self._compiling.values()], WAIT_SECONDS, FIRST_COMPLETED)
        taken: list[tuple[Request, RequestError | None]] = []
        for request, future in [entry for entry in self._compiling.values() if entry[1].done()]:
            del self._compiling[request.request_id]
            taken.append((request, self._error_of(request, future)))
        return taken

    @property
    def num_held(self) -> int:
        """Grammars of requests that run or have ended since the last `keep_held`."""
        return len(self._held)

    def keep_held(self, request_ids: Iterable[str]) -> None:
        """Release the grammars of all other requests."""
        alive = set(request_ids)
        self._held = {name: grammar for name, grammar in self._held.items() if name in alive}

    def _error_of(self, request: Request, future: "Future[Grammar]") -> RequestError | None:
        try:
            self._held[request.request_id] = future.result()
        except RequestError as error:
            return error
        except (Exception, CancelledError) as error:
            spec = request.params.structured_outputs
            asked_as = spec.asked_as if spec is not None else None
            return RequestError(f"{asked_as} could not be compiled: {error}", param=asked_as, code="invalid_grammar")
        return None
