"""Workloads of a cluster: sessions of turns. A turn arrives after the one before it was answered.

A trace's rows are sessions of one turn each. Agents are sessions of many turns, whose prompts grow by what the tools
return: long prompts, short answers, and pauses with a heavy tail.
"""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from quire.simulation.arrivals import Arrival

Token = int


class Turn(NamedTuple):
    """One request. `pieces` make up the prompt: (content id, number of tokens); equal ids mean equal tokens."""

    session: int
    number: int
    pieces: tuple[tuple[int, int], ...]
    output_tokens: int
    pause: float = 0.0
    """Seconds from the end of this turn's answer to the next turn."""

    @property
    def prompt_tokens(self) -> int:
        return sum(length for _, length in self.pieces)


class Session(NamedTuple):
    """A conversation that begins at `start` seconds."""

    start: float
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class AgentShape:
    """Agents as published traces describe them: 33 turns, 131 prompt tokens per output token, pauses of 5 s in the
    middle and 81 s at the 99th percentile."""

    num_turns: int = 33
    system_tokens: int = 4096
    """Tokens at the beginning of every prompt, which all sessions of one kind share."""
    num_kinds: int = 4
    output_tokens: int = 145
    tokens_per_output: float = 131.0
    median_pause: float = 5.0
    p99_pause: float = 81.0


_FIRST_OWN_ID = 2**20
"""Content ids from here on belong to one session alone."""
_Z99 = 2.3263478740408408
"""The 99th percentile of a normal distribution."""


def agent_sessions(shape: AgentShape, num_sessions: int, rate: float, seed: int) -> Iterator[Session]:
    """Sessions that begin at random, `rate` per second."""
    draw = random.Random(f"agents {seed}")
    sigma = math.log(shape.p99_pause / shape.median_pause) / _Z99
    mean_prompt = shape.tokens_per_output * shape.output_tokens
    growth = max(1.0, (mean_prompt - shape.system_tokens) * 2 / (shape.num_turns + 1))
    start = 0.0
    for session in range(num_sessions):
        start += draw.expovariate(rate)
        pieces = [(draw.randrange(shape.num_kinds), shape.system_tokens)]
        turns = []
        for number in range(shape.num_turns):
            own = _FIRST_OWN_ID + session * shape.num_turns + number
            pieces.append((own, max(1, round(draw.expovariate(1 / growth)))))
            output = max(1, round(draw.expovariate(1 / shape.output_tokens)))
            pause = shape.median_pause * math.exp(sigma * draw.gauss(0, 1))
            turns.append(Turn(session, number, tuple(pieces), output, pause))
        yield Session(start, tuple(turns))


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Prompts of groups that share their beginning, as in llm-d's published benchmark of routing: 150 groups of five
    prompts, 6,000 shared and 1,200 own tokens, answers of 1,000."""

    num_groups: int = 150
    prompts_per_group: int = 5
    shared_tokens: int = 6000
    own_tokens: int = 1200
    output_tokens: int = 1000


def group_sessions(shape: GroupShape, num_requests: int, rate: float, seed: int) -> Iterator[Session]:
    """Single requests, `rate` per second at random times: every prompt once in random order, then again."""
    draw = random.Random(f"groups {seed}")
    prompts: list[int] = []
    start = 0.0
    for number in range(num_requests):
        start += draw.expovariate(rate)
        if not prompts:
            prompts = list(range(shape.num_groups * shape.prompts_per_group))
            draw.shuffle(prompts)
        prompt = prompts.pop()
        group = prompt // shape.prompts_per_group
        pieces = ((group, shape.shared_tokens), (_FIRST_OWN_ID + prompt, shape.own_tokens))
        yield Session(start, (Turn(number, 0, pieces, shape.output_tokens),))


def trace_sessions(arrivals: Iterable[Arrival], tokens_per_id: int) -> Iterator[Session]:
    """A session of one turn for each row of a trace. Rows without `hash_ids` share nothing."""
    for arrival in arrivals:
        row, number = arrival.row, arrival.number
        left = row.prompt_tokens
        pieces = []
        for content in row.hash_ids:
            length = min(tokens_per_id, left)
            pieces.append((content, length))
            left -= length
        if left:
            pieces.append((2**31 + number, left))
        yield Session(arrival.time, (Turn(number, 0, tuple(pieces), row.output_tokens),))
