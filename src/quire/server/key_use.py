"""KeyUse: what each API key has in use, and its limits. Every generation and embedding is admitted here first.

The prompts' tokens are taken from the key's tokens per minute at once, the answers' as they are generated: these may
overdraw it, and the next request then waits for longer.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from quire.errors import ConfigError, EngineUnavailableError, QueueFullError
from quire.server.api_keys import ApiKey
from quire.server.backend import Engine
from quire.server.errors import Refusal
from quire.server.settings import ServerSettings

_KEPT = 0.9
"""Weight of earlier requests in the mean duration."""


@dataclass(slots=True)
class KeyUse:
    """The use of one key. `admit` and its `Admission` write it."""

    key: ApiKey
    sees_all: bool = True
    """/kv and /metrics show the whole server."""
    clock: Callable[[], float] = time.monotonic
    num_requests: int = 0
    """Requests being answered."""
    num_waiting: int = 0
    """Their prompts that have no output yet."""
    num_ended: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_refused: dict[str, int] = field(default_factory=dict)
    """Requests refused, by the limit they met."""
    _mean_seconds: float = 1.0
    """Duration of a request."""
    _balance: float = field(init=False)
    """Tokens that may be used now; below 0 if answers overdrew it."""
    _balanced_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._balance = float(self.key.tokens_per_minute or 0)
        self._balanced_at = self.clock()

    @contextmanager
    def admit(self, num_prompts: int, num_tokens: int, max_queue_size: int) -> "Iterator[Admission]":
        """The time in which a request of so many prompts, with `num_tokens` in all, is answered.

        Raises `Refusal` with the limit and its value: 429 and Retry-After if the key uses too much at present, 400 for
        a request that its limits never allow.
        """
        self._check_concurrency()
        self._check_queue(num_prompts, max_queue_size)
        self._check_tokens(num_tokens)
        started = self.clock()
        admission = Admission(self, num_prompts)
        self.num_requests += 1
        self.num_waiting += num_prompts
        self._take(num_tokens)
        self.num_prompt_tokens += num_tokens
        try:
            yield admission
        except (QueueFullError, EngineUnavailableError):
            if admission.num_waiting == num_prompts:  # nothing was computed
                self._balance += num_tokens
                self.num_prompt_tokens -= num_tokens
            raise
        finally:
            self.num_requests -= 1
            self.num_waiting -= admission.num_waiting
            self.num_ended += 1
            self._mean_seconds = _KEPT * self._mean_seconds + (1 - _KEPT) * (self.clock() - started)

    def _check_concurrency(self) -> None:
        limit = self.key.max_concurrency
        if limit is not None and self.num_requests >= limit:
            wait = self._mean_seconds / limit
            raise self._refusal("max_concurrency", f"{self.num_requests} of its requests are running", limit, wait)

    def _check_queue(self, num_prompts: int, max_queue_size: int) -> None:
        share = self.key.queue_share
        if share is None or not max_queue_size:
            return
        limit, shown = max(1, int(share * max_queue_size)), f"{share:g} of {max_queue_size} (max_queue_size)"
        if num_prompts > limit:
            raise self._refusal("queue_share", f"the request has {num_prompts} prompts", f"{limit}, {shown}", None)
        if self.num_waiting + num_prompts > limit:
            about = f"{self.num_waiting} of its prompts are waiting and the request has {num_prompts}"
            raise self._refusal("queue_share", about, f"{limit}, {shown}", self._mean_seconds)

    def _check_tokens(self, num_tokens: int) -> None:
        limit = self.key.tokens_per_minute
        if limit is None:
            return
        if num_tokens > limit:
            raise self._refusal("tokens_per_minute", f"the request has {num_tokens} prompt tokens", limit, None)
        self._take(0)
        missing = max(1, num_tokens) - self._balance
        if missing > 0:
            about = f"the request has {num_tokens} prompt tokens and {max(0, int(self._balance))} are left"
            raise self._refusal("tokens_per_minute", about, limit, missing * 60 / limit)

    def _take(self, num_tokens: int) -> None:
        """Bring the balance to the present and take tokens from it."""
        limit = self.key.tokens_per_minute
        if limit is not None:
            now = self.clock()
            self._balance = min(limit, self._balance + (now - self._balanced_at) * limit / 60) - num_tokens
            self._balanced_at = now

    def _refusal(self, name: str, about: str, limit: object, wait: float | None) -> Refusal:
        """The refusal by limit `name`; `wait`: seconds after which the request may fit, None if never."""
        self.num_refused[name] = self.num_refused.get(name, 0) + 1
        message = f"the limit of the API key {self.key.name!r} is reached: {about}, its {name} is {limit}"
        if wait is None:
            return Refusal(400, f"{message}; shorten or split the request", code=f"{name}_exceeded")
        seconds = max(1, math.ceil(wait))
        retry_after = (b"retry-after", str(seconds).encode())
        return Refusal(429, f"{message}; try again in {seconds} s", code=f"{name}_exceeded", headers=(retry_after,))


@dataclass(slots=True)
class Admission:
    """One request that a key's limits have let in."""

    use: KeyUse
    num_waiting: int
    """Prompts without output yet."""

    def note_first(self) -> None:
        """A prompt has its first output."""
        self.num_waiting -= 1
        self.use.num_waiting -= 1

    def note_tokens(self, num_tokens: int) -> None:
        """So many tokens were generated."""
        self.use.num_generated_tokens += num_tokens
        self.use._take(num_tokens)


class KeyRing:
    """The use of all keys of a server, by account. Without keys there is one account, which has no limit."""

    def __init__(self, settings: ServerSettings) -> None:
        self._without_keys = not settings.keys
        self._uses = {key.account: KeyUse(key, key.admin or len(settings.keys) == 1) for key in settings.keys}

    def use_of(self, account: str) -> KeyUse:
        """The use of the account's key; without limits if the key is gone, which batches can outlive."""
        use = self._uses.get(account)
        if use is None:
            self._uses[account] = use = KeyUse(ApiKey(), self._without_keys)
        return use

    @property
    def named(self) -> list[KeyUse]:
        """The use of each key from the file."""
        return [use for use in self._uses.values() if use.key.name]


def check_keys(settings: ServerSettings, engine: Engine) -> None:
    """Raise `ConfigError` for limits that this engine cannot keep: models it does not serve, shares of no queue."""
    served = [*engine.model_names, *engine.other_names, *engine.adapters.names]
    for key in settings.keys:
        for name in key.models or ():
            if name not in served and not settings.allow_runtime_lora:
                raise ConfigError(
                    f"api_keys {settings.api_keys}, {key.name}: models holds {name!r}; served: {', '.join(served)}"
                )
        if key.queue_share is not None and not engine.max_queue_size:
            raise ConfigError(
                f"api_keys {settings.api_keys}, {key.name}: queue_share is {key.queue_share:g}, but max_queue_size is "
                "0, which is no limit; set --max-queue-size"
            )
