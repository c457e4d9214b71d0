"""Replica: one server as the policies see it, and the work that the router has sent to it. No I/O."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Load:
    """What a replica has in hand, in tokens. The router counts what it sent, and needs no answer from the replica."""

    num_requests: int = 0
    num_waiting: int = 0
    """Requests without a first token."""
    queued_tokens: int = 0
    """Prompt tokens to compute before all requests have their first token."""
    context_tokens: int = 0
    """Tokens of all requests: their KV, which every step of decoding reads."""
    total_tokens: int = 0
    """Tokens that the replica has computed or will compute: the sum over all requests so far."""

    def begin(self, work: "Work") -> None:
        """A request was sent."""
        self.num_requests += 1
        self.num_waiting += 1
        self.queued_tokens += work.num_new_tokens
        self.context_tokens += work.num_tokens
        self.total_tokens += work.num_new_tokens

    def add_tokens(self, work: "Work", num_tokens: int) -> None:
        """Output tokens have come."""
        if not work.has_begun:
            work.has_begun = True
            self.num_waiting -= 1
            self.queued_tokens -= work.num_new_tokens
        work.num_tokens += num_tokens
        self.context_tokens += num_tokens
        self.total_tokens += num_tokens

    def end(self, work: "Work") -> None:
        """A request has ended, however it did."""
        self.num_requests -= 1
        self.context_tokens -= work.num_tokens
        if not work.has_begun:
            self.num_waiting -= 1
            self.queued_tokens -= work.num_new_tokens


@dataclass(slots=True)
class Replica:
    """A server that requests can be sent to."""

    number: int
    """Its bit in the prefix index."""
    name: str
    load: Load = field(default_factory=Load)
    max_requests: int = 0
    """Most requests that it is sent at once; 0: no limit."""

    @property
    def is_full(self) -> bool:
        return bool(self.max_requests) and self.load.num_requests >= self.max_requests


@dataclass(slots=True)
class Work:
    """One request on its way through a replica."""

    replica: Replica
    num_new_tokens: int
    """Prompt tokens that the replica probably has to compute."""
    num_tokens: int
    """Tokens of the prompt, and of the output so far."""
    has_begun: bool = False
    """The first token has come."""
