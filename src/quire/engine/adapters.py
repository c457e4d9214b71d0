"""Adapters of one engine: which are in memory, and the requests that wait for theirs.

Requests whose adapter is in a slot go on at once. The others wait here, outside the scheduler, while a thread loads
their adapter into a slot that no request uses; the least recently used adapter gives up its slot. So steps never wait
for a load, and whatever the scheduler runs has its adapter in memory until it ends.

Where every slot is in use, the least recently used adapter drains: further requests for it wait behind those that
wait already. So traffic for some adapters cannot keep others out.
"""

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

from quire.errors import CheckpointError, RequestError
from quire.request import Request

MAX_CHECKED = 10_000
"""Adapters that are remembered as fitting."""
WAIT_SECONDS = 0.05
"""Longest wait for a load in a step without other work; then messages are read again."""


class Slots(Protocol):
    """Where adapters are loaded (`quire.lora.slots.AdapterSlots`)."""

    def __len__(self) -> int: ...

    def check(self, path: str) -> object:
        """Raises `CheckpointError` for an adapter that does not fit the model."""
        ...

    def load(self, path: str, digest: str, slot: int) -> None:
        """Replace what a slot holds. Raises `CheckpointError`."""
        ...


class _Load(NamedTuple):
    """A load in progress."""

    adapter: str
    slot: int
    future: "Future[None]"


class WaitingForAdapter:
    """Requests wait in the order of their arrival. One adapter is loaded at a time."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._free = list(range(len(slots) - 1, -1, -1))
        self._loaded: dict[str, int] = {}
        """Adapter → slot, the least recently used first."""
        self._checked: set[str] = set()
        """Adapters that were found to fit the model."""
        self._draining = ""
        """An adapter whose slot is wanted."""
        self._loading: _Load | None = None
        self._waiting: dict[str, Request] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-loader")
        self.total_loads = 0
        """Since the start."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def add(self, request: Request) -> bool:
        """Whether the request can run now; else `take` returns it later. Raises `RequestError` for an adapter that
        cannot be used with the model."""
        if request.adapter in self._loaded and request.adapter != self._draining:
            self._touch(request.adapter)
            return True
        self._check(request)
        self._waiting[request.request_id] = request
        return False

    def abort(self, request_id: str) -> None:
        """Remove a request. A load that has begun goes on."""
        self._waiting.pop(request_id, None)

    def take(
        self, adapters_in_use: Callable[[], Collection[str]], *, block: bool
    ) -> list[tuple[Request, RequestError | None]]:
        """Requests whose adapter has been loaded or has failed. With `block`, wait up to `WAIT_SECONDS` for one.

        `adapters_in_use` are those of the requests that were taken before and have not ended.
        """
        taken: list[tuple[Request, RequestError | None]] = []
        if block and self._loading is not None:
            wait([self._loading.future], WAIT_SECONDS)
        if self._loading is not None and self._loading.future.done():
            taken += self._end_load(self._loading)
        if not any(self._must_load(request) for request in self._waiting.values()):
            self._draining = ""
        for request in list(self._waiting.values()):
            if request.adapter in self._loaded and request.adapter != self._draining:
                del self._waiting[request.request_id]
                self._touch(request.adapter)
                taken.append((request, None))
        if self._loading is None:
            wanted = next((request for request in self._waiting.values() if self._must_load(request)), None)
            if wanted is not None:
                used = {request.adapter for request, error in taken if error is None}
                self._begin_load(wanted, used.union(adapters_in_use()))
        return taken

    def close(self) -> None:
        """Wait for a load in progress and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    @property
    def request_ids(self) -> list[str]:
        """Ids of the waiting requests."""
        return list(self._waiting)

    @property
    def num_loaded(self) -> int:
        return len(self._loaded)

    def _check(self, request: Request) -> None:
        if request.adapter in self._checked:
            return
        try:
            self._slots.check(request.adapter_path)
        except CheckpointError as error:
            raise adapter_error(error) from error
        if len(self._checked) >= MAX_CHECKED:
            self._checked.clear()
        self._checked.add(request.adapter)

    def _must_load(self, request: Request) -> bool:
        return request.adapter not in self._loaded

    def _touch(self, adapter: str) -> None:
        self._loaded[adapter] = self._loaded.pop(adapter)

    def _begin_load(self, request: Request, used: Collection[str]) -> None:
        """Load a request's adapter, if there is a slot for it."""
        if not self._free:
            idle = [adapter for adapter in self._loaded if adapter not in used]
            if not idle:
                self._draining = self._draining or next(iter(self._loaded), "")
                return
            evicted = self._draining if self._draining in idle else idle[0]
            self._free.append(self._loaded.pop(evicted))
        self._draining = ""
        slot = self._free.pop()
        future = self._thread.submit(self._slots.load, request.adapter_path, request.adapter, slot)
        self._loading = _Load(request.adapter, slot, future)

    def _end_load(self, load: _Load) -> list[tuple[Request, RequestError | None]]:
        """Note the loaded adapter, or return the requests that wanted one that failed."""
        self._loading = None
        error = load.future.exception()
        if error is None:
            self._loaded[load.adapter] = load.slot
            self.total_loads += 1
            return []
        self._free.append(load.slot)
        if not isinstance(error, CheckpointError | OSError):
            raise error
        failed = [request for request in self._waiting.values() if request.adapter == load.adapter]
        for request in failed:
            del self._waiting[request.request_id]
        return [(request, adapter_error(error)) for request in failed]


def adapter_error(error: Exception) -> RequestError:
    """An adapter's fault as the error of the request that named it."""
    return RequestError(str(error), param="model", code="invalid_adapter")
