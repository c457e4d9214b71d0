"""Blame: which requests may have killed the engine process, and which of them run next to find out.

A death counts against a request that was in the step that died, if no token came since the death before. After two such
deaths the request is a suspect. Suspects run apart: first a half of them, then a half of the half that died, at last
one alone. One that dies alone is guilty. A token clears a suspect. While suspects run apart, all other requests wait.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from hashlib import blake2b

import msgspec

from quire.request import Request

DEATHS_OF_A_SUSPECT = 2
"""Deaths in a row, without a token in between, that make a request a suspect."""
MAX_QUARANTINED = 1024


class Blame:
    """Requests by id, in the order of their arrival. It decides; sending them is the caller's work."""

    def __init__(self) -> None:
        self._num_deaths: dict[str, int] = {}
        """Deaths in a row that count against a request."""
        self._group: list[str] = []
        """The suspects that run apart now."""
        self._groups: deque[list[str]] = deque()
        """The groups of suspects that run apart next."""

    @property
    def group(self) -> tuple[str, ...]:
        """The suspects that run apart now, while all others wait; empty if none do."""
        return tuple(self._group)

    @property
    def has_suspects(self) -> bool:
        """Whether a death counts against a request."""
        return bool(self._num_deaths)

    def may_run(self, request_id: str) -> bool:
        """Whether a request may be in the engine now."""
        return not self._group or request_id in self._group

    def num_deaths(self, request_id: str) -> int:
        """Deaths in a row that count against a request."""
        return self._num_deaths.get(request_id, 0)

    def count_death(self, in_step: Collection[str]) -> str | None:
        """The engine died in a step with these requests. Returns the id of the one that is guilty, if that is shown."""
        for request_id in in_step:
            self._num_deaths[request_id] = self._num_deaths.get(request_id, 0) + 1
        if self._group:
            suspects = [name for name in self._group if name in in_step]
        else:
            suspects = [name for name in in_step if self._num_deaths[name] >= DEATHS_OF_A_SUSPECT]
        if not suspects:  # it died between two steps, or in a step without them: the same group runs again
            return None
        others_had_tokens = all(self._num_deaths[name] == 1 for name in in_step if name not in suspects)
        if len(suspects) == 1 and others_had_tokens and self._num_deaths[suspects[0]] > DEATHS_OF_A_SUSPECT:
            self.clear(suspects[0])
            return suspects[0]
        if absent := [name for name in self._group if name not in in_step]:
            self._groups.append(absent)
        self._run_apart(suspects)
        return None

    def clear(self, request_id: str) -> None:
        """A token of the request came, or the request has ended."""
        if self._num_deaths.pop(request_id, None) is None:
            return
        for group in (self._group, *self._groups):
            if request_id in group:
                group.remove(request_id)
        self._next_group()

    def move_on(self) -> None:
        """The group has run long enough without a death: the next one may run beside it."""
        self._group = []
        self._next_group()

    def _run_apart(self, suspects: list[str]) -> None:
        half = (len(suspects) + 1) // 2
        if suspects[half:]:
            self._groups.appendleft(suspects[half:])
        self._group = suspects[:half]

    def _next_group(self) -> None:
        while not self._group and self._groups:
            self._group = self._groups.popleft()


class Quarantine:
    """Contents that are refused for a while, because the engine died when it computed them alone."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        """`seconds`: how long a content is refused."""
        self.seconds = seconds
        self._clock = clock
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, request: Request) -> None:
        """Refuse the content of the request from now on."""
        self._until[content_hash(request)] = self._clock() + self.seconds
        if len(self._until) > MAX_QUARANTINED:
            self._until.popitem(last=False)

    def remaining(self, request: Request) -> float:
        """Seconds for which the content of the request is still refused, 0 if it is not."""
        now = self._clock()
        for expired in [key for key, until in self._until.items() if until <= now]:
            del self._until[expired]
        return self._until.get(content_hash(request), now) - now if self._until else 0.0


def content_hash(request: Request) -> bytes:
    """A digest of the prompt and the parameters, without the seed and the client: equal requests have equal ones."""
    params = request.params.with_changes(seed=None)
    content = (request.task, request.prompt_token_ids, params, request.max_tokens, request.adapter, request.inputs)
    return blake2b(msgspec.msgpack.encode(content), digest_size=16).digest()
