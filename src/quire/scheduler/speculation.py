"""Speculation: how many drafted tokens each decoding sequence takes into a step, so that the most tokens come out per
second.

A draft is a guess at the next tokens. Computed with the sequence's last token in one step, it shows which of its tokens
are those that would have been drawn; the others are taken back. What is decided here costs or saves time and never
changes a token.

Two things are known of a choice. What it brings: drafts are judged by what came after them, whether they were computed
or not, those after a long run apart from those after a short one. A sequence begins with what drafts of all others have
shown and soon goes by its own. That gives the probability p that a drafted token holds if those before it do; the j-th
of a draft holds with p ** j. What it costs: the times of the last steps, by their number of tokens. Of all drafted
tokens of the batch, likeliest first, as many are taken as give the highest expected number of tokens per second
(goodput; Liu et al., "Optimizing Speculative Decoding for Serving LLMs Using Goodput", 2024). So a sequence in the
midst of a copy gets a long draft, one that has just come upon two tokens it had before a short one or none, and a batch
that keeps the machine busy by itself gets none.
"""

import bisect
import math
from collections import deque
from collections.abc import Sequence

from quire.config import SpeculativeConfig
from quire.scheduler.ngram_lookup import NgramLookup, follow

_FORGETTING = 0.98
"""Weight that what is known of drafts keeps from one to the next."""
_PRIOR = 3.0
"""Judged tokens that weigh as much as what was believed before any was."""
_DOUBT = 1.0
"""Drafted tokens that are taken to have failed before any was judged. It fades, as what is judged does."""
_MIN_CHANCE = 0.02
"""Drafted tokens that are less likely to hold are not thought about."""
_MIN_GAIN = 1.1
"""Drafts are made only where they promise more tokens per second by this factor. The best of many noisy estimates
promises too much; this much is not lost to it."""
_PATIENCE = 32
"""Steps without a draft worth taking after which one is looked for in every `_PAUSE`-th step only."""
_PAUSE = 16
_NUM_TIMES = 7
"""Steps of one size whose median counts."""
_MIN_TIMES = 3
"""Steps of a size that must have been seen before anything is added to steps of that size."""
_FEW = 4
"""Up to this many sequences are looked up at once: asking first whether it can pay would take as long."""
_MAX_AGE = 30.0
"""Seconds after which a step time is no longer believed: contexts have grown, neighbours have come or gone."""


class Acceptance:
    """How likely a drafted token holds if those before it do, by how the last drafts fared."""

    __slots__ = ("_held", "_missed", "_shared")

    def __init__(self, shared: "Acceptance | None" = None) -> None:
        """`shared` is that of all sequences, for one of them."""
        self._held, self._missed = 0.0, _DOUBT
        self._shared = shared

    @property
    def probability(self) -> float:
        """Below 1, and low while little is known: drafts are judged without being computed, so nothing is lost by
        waiting."""
        believed = 0.0 if self._shared is None else self._shared.probability
        return (self._held + _PRIOR * believed) / (self._held + self._missed + _PRIOR)

    def judge(self, draft: Sequence[int], came: Sequence[int]) -> None:
        """Learn from a draft of which `came` shows at least the first token."""
        num_held = num_equal(draft, came)
        self._held = _FORGETTING * self._held + num_held
        self._missed = _FORGETTING * self._missed + (num_held < min(len(draft), len(came)))
        if self._shared is not None:
            self._shared.judge(draft, came)


class Drafts:
    """One sequence's drafts: what followed a run of tokens that ends it, where that run stood before."""

    __slots__ = ("_acceptances", "_lookup", "_num_tokens", "_proposed", "acceptance")

    def __init__(self, lookup: NgramLookup, shared: Sequence[Acceptance]) -> None:
        """Of those `shared` with all sequences the n-th is of drafts after runs of 2**n to 2**(n + 1) − 1."""
        self._lookup = lookup
        self._acceptances = [Acceptance(each) for each in shared]
        self._proposed: list[int] = []
        self._num_tokens = 0
        """The sequence's, when they were proposed."""
        self.acceptance = self._acceptances[0]
        """Of those proposed."""

    def propose(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """Judge the last draft by what `token_ids` has gained since, and make the next, which may be empty."""
        came = token_ids[self._num_tokens : self._num_tokens + len(self._proposed)]
        if came:
            self.acceptance.judge(self._proposed, came)
        self._num_tokens, self._proposed = len(token_ids), []
        match = self._lookup.find(token_ids)
        if match is not None:
            self._proposed = follow(token_ids, match.start, max_tokens)
            self.acceptance = self._acceptances[match.length.bit_length() - 1]
        return self._proposed


class StepTimes:
    """Seconds of steps by their number of tokens."""

    def __init__(self) -> None:
        self._times: dict[int, _Times] = {}
        """Of each class of sizes."""
        self._drafted = False
        """Whether the last step was."""

    def measure(self, num_tokens: int, seconds: float, now: float, *, drafted: bool = False) -> None:
        """Take in a step that did nothing but decode, and whether it computed drafts.

        One without that follows one with is passed over: it cannot go on from the step before as it would if there
        were no drafts, which is what they are compared with.
        """
        follows_drafts, self._drafted = self._drafted and not drafted, drafted
        if follows_drafts:
            return
        size = _size_class(num_tokens)
        times = self._times.get(size)
        if times is None or now - times.last > _MAX_AGE:
            times = self._times[size] = _Times()
        times.add(seconds, now)

    def curve(self, num_tokens: int, now: float) -> "StepCurve | None":
        """What steps take that were measured lately; None if those of `num_tokens` are not known well enough."""
        own = self._times.get(_size_class(num_tokens))
        if own is None or own.num < _MIN_TIMES or now - own.last > _MAX_AGE:
            return None
        return StepCurve(
            sorted((size, each.median) for size, each in self._times.items() if now - each.last <= _MAX_AGE)
        )


class _Times:
    """Of steps of one size, the last ones."""

    __slots__ = ("_median", "_seconds", "last")

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_NUM_TIMES)
        self._median: float | None = None
        self.last = 0.0
        """When the last one ended."""

    @property
    def num(self) -> int:
        return len(self._seconds)

    @property
    def median(self) -> float:
        """Worked out when it is asked for: most steps are followed by one of their own size that is not drafted for."""
        if self._median is None:
            self._median = sorted(self._seconds)[len(self._seconds) // 2]
        return self._median

    def add(self, seconds: float, now: float) -> None:
        self._seconds.append(seconds)
        self._median = None
        self.last = now


class StepCurve:
    """Seconds of a step as a function of its number of tokens, by interpolation between those that were measured.

    No step is taken to be slower than one of more tokens. Beyond the largest more tokens are taken to cost nothing: the
    way to measure them is to try.
    """

    def __init__(self, points: list[tuple[int, float]]) -> None:
        """`points` in the order of their number of tokens."""
        self._points = points
        least = math.inf
        for place in range(len(points) - 1, -1, -1):
            size, seconds = points[place]
            if seconds > least:
                points[place] = size, least
            else:
                least = seconds

    def seconds(self, num_tokens: int) -> float:
        place = bisect.bisect_left(self._points, (num_tokens, 0.0))
        if place == len(self._points):
            return self._points[-1][1]
        right, after = self._points[place]
        if place == 0:
            return after
        left, before = self._points[place - 1]
        return before + (after - before) * (num_tokens - left) / (right - left)

    def rate(self, num_tokens: int) -> float:
        """Tokens per second."""
        return num_tokens / self.seconds(num_tokens)

    def best_rate(self, first: int, last: int) -> float:
        """The most tokens per second of any step of `first` to `last` tokens. It is reached where a piece ends."""
        sizes = {first, last, *(size for size, _ in self._points if first < size < last)}
        return max(map(self.rate, sizes))


class Speculation:
    """Chooses the drafts of every step. Owned by the scheduler."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self.times = StepTimes()
        self._shared = [Acceptance() for _ in range(config.prompt_lookup_max.bit_length())]
        self._num_unused = 0
        """Steps that only decoded since a draft was taken."""

    @property
    def max_tokens(self) -> int:
        """The longest draft."""
        return self._config.num_speculative_tokens

    @property
    def pauses(self) -> bool:
        """Whether drafts are looked for now and then only."""
        return self._num_unused > _PATIENCE

    @property
    def measures(self) -> bool:
        """Whether what this step takes is worth knowing: in a pause only just before it ends."""
        return not self.pauses or self._num_unused % _PAUSE >= _PAUSE - _MIN_TIMES

    @property
    def looks_next(self) -> bool:
        """Whether to look for drafts in the next step that only decodes."""
        return self._num_unused < _PATIENCE or (self._num_unused + 1) % _PAUSE == 0

    def begin_step(self) -> bool:
        """Whether to look for drafts in this step, which only decodes."""
        looks = self.looks_next
        self._num_unused += 1
        return looks

    def new_drafts(self) -> Drafts:
        """For a sequence that has none yet."""
        lookup = NgramLookup(self._config.prompt_lookup_min, self._config.prompt_lookup_max)
        return Drafts(lookup, self._shared)

    def choose(
        self, candidates: Sequence[tuple[Drafts, list[int], int]], num_tokens: int, max_drafted: int, now: float
    ) -> list[list[int]]:
        """The draft, perhaps empty, of each of `candidates`, whose tokens are to be computed beside `num_tokens`.

        A candidate is a sequence's drafts, its tokens, and how many may be drafted; `max_drafted` is for all.
        """
        nothing: list[list[int]] = [[] for _ in candidates]
        max_drafted = min(max_drafted, len(candidates) * self.max_tokens)
        if max_drafted <= 0:
            return nothing
        curve = self.times.curve(num_tokens, now) if len(candidates) > _FEW else None
        if curve is not None and curve.best_rate(num_tokens, num_tokens + max_drafted) < _MIN_GAIN * curve.rate(
            num_tokens
        ):
            return nothing  # not even if every token held: nobody's tokens are looked at
        proposed = [
            drafts.propose(token_ids, min(most, self.max_tokens)) if most > 0 else []
            for drafts, token_ids, most in candidates
        ]
        curve = self.times.curve(num_tokens, now) if any(proposed) else None
        if curve is None:
            return nothing
        likely: list[tuple[float, int]] = []
        for index, ((drafts, _, _), draft) in enumerate(zip(candidates, proposed, strict=True)):
            probability = chance = drafts.acceptance.probability
            for _ in draft:
                if chance < _MIN_CHANCE:
                    break
                likely.append((chance, index))
                chance *= probability
        likely.sort(key=lambda each: -each[0])
        expected, best_rate, num_best = float(num_tokens), _MIN_GAIN * curve.rate(num_tokens), 0
        for count, (chance, _) in enumerate(likely[:max_drafted], start=1):
            expected += chance
            rate = expected / curve.seconds(num_tokens + count)
            if rate > best_rate:
                best_rate, num_best = rate, count
        lengths = [0] * len(candidates)
        for _, index in likely[:num_best]:
            lengths[index] += 1
        if num_best:
            self._num_unused = 0
        return [draft[:length] for draft, length in zip(proposed, lengths, strict=True)]


def num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _size_class(num_tokens: int) -> int:
    """Steps of up to 16 tokens have a class each; larger ones share it with those less than an eighth larger."""
    shift = max(0, num_tokens.bit_length() - 4)
    return num_tokens >> shift << shift
