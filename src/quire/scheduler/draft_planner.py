"""DraftPlanner: how many drafted tokens each decoding sequence takes into a step, so that the most tokens come out per
second.

A draft is a guess at a sequence's next tokens. Computed in one step with the sequence's last token, it shows which of
its tokens would have been sampled; the others are rolled back. Decisions here cost or save time and never change a
token.

A choice has a benefit and a cost. The benefit follows from an `AcceptanceModel`: it gives the probability p that a
drafted token is accepted if the tokens before it are, so the j-th token of a draft is accepted with p ** j. A sequence
starts with what drafts of all sequences have shown, and soon follows its own. The cost follows from the times of the
last steps, by their number of tokens. All drafted tokens of the batch are sorted, likeliest first, and as many are
taken as give the highest expected number of tokens per second (goodput; Liu et al., "Optimizing Speculative Decoding
for Serving LLMs Using Goodput", 2024). So a sequence in the middle of a copy gets a long draft, a sequence that has
just repeated two tokens gets a short one or none, and a batch that keeps the machine busy by itself gets none.
"""

from collections.abc import Sequence

from quire.scheduler.acceptance import AcceptanceModel
from quire.scheduler.proposers import PROPOSERS, Proposer
from quire.scheduler.step_times import MIN_TIMES, StepTimes
from quire.speculative_config import SpeculativeConfig

_MIN_CHANCE = 0.02
"""Drafted tokens that are less likely to be accepted are not considered."""
_MIN_GAIN = 1.1
"""Drafts are taken only if they promise more tokens per second by this factor. The best of many noisy estimates is too
high; this factor absorbs the error."""
_PATIENCE = 32
"""Steps without a draft worth taking after which only every `_PAUSE`-th step looks for one."""
_PAUSE = 16
_FEW = 4
"""Most sequences that are looked up at once: asking first whether drafts can pay would take as long."""


class SequenceDrafts:
    """One sequence's proposer, its last draft, and how its drafts fared."""

    __slots__ = ("_draft", "_models", "_num_tokens", "_proposer", "_shared", "acceptance")

    def __init__(self, proposer: Proposer, shared: dict[int, AcceptanceModel]) -> None:
        """`shared` holds the acceptance models of all sequences, by kind of draft."""
        self._proposer = proposer
        self._shared = shared
        self._models: dict[int, AcceptanceModel] = {}
        self._draft: list[int] = []
        self._num_tokens = 0
        """The sequence's tokens when the draft was proposed."""
        self.acceptance = self._model(0)
        """The acceptance model of the last draft."""

    def propose(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """Judge the last draft by the tokens that came since, and return the next one, which may be empty."""
        came = token_ids[self._num_tokens : self._num_tokens + len(self._draft)]
        if came:
            self.acceptance.judge(self._draft, came)
        self._num_tokens = len(token_ids)
        draft, kind = self._proposer.propose(token_ids, max_tokens)
        self._draft = draft
        if draft:
            self.acceptance = self._models.get(kind) or self._model(kind)
        return draft

    def _model(self, kind: int) -> AcceptanceModel:
        """A new acceptance model for a kind of draft."""
        shared = self._shared.setdefault(kind, AcceptanceModel())
        model = self._models[kind] = AcceptanceModel(shared)
        return model


Candidate = tuple[SequenceDrafts, list[int], int]
"""A sequence's drafts, its tokens, and how many may be drafted."""


class DraftPlanner:
    """Chooses the drafts of every step. Owned by the scheduler."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self._make_proposer = PROPOSERS[config.method]
        self.times = StepTimes()
        self._shared: dict[int, AcceptanceModel] = {}
        self._num_unused = 0
        """Steps that only decoded since a draft was taken."""

    @property
    def max_tokens(self) -> int:
        """The longest draft."""
        return self._config.num_speculative_tokens

    @property
    def pauses(self) -> bool:
        """Whether only some steps look for drafts."""
        return self._num_unused > _PATIENCE

    @property
    def measures(self) -> bool:
        """Whether to measure this step: in a pause only just before it ends."""
        return not self.pauses or self._num_unused % _PAUSE >= _PAUSE - MIN_TIMES

    @property
    def looks_next(self) -> bool:
        """Whether the next step that only decodes looks for drafts."""
        return self._num_unused < _PATIENCE or (self._num_unused + 1) % _PAUSE == 0

    def begin_step(self) -> bool:
        """Whether to look for drafts in this step, which only decodes."""
        looks = self.looks_next
        self._num_unused += 1
        return looks

    def new_drafts(self) -> SequenceDrafts:
        """The drafts of a sequence that has none yet."""
        return SequenceDrafts(self._make_proposer(self._config), self._shared)

    def choose(self, candidates: Sequence[Candidate], num_tokens: int, max_drafted: int, now: float) -> list[list[int]]:
        """The draft, perhaps empty, of each candidate, for a step that computes `num_tokens` besides.

        At most `max_drafted` tokens in all.
        """
        nothing: list[list[int]] = [[] for _ in candidates]
        max_drafted = min(max_drafted, len(candidates) * self.max_tokens)
        if max_drafted <= 0:
            return nothing
        curve = self.times.curve(num_tokens, now) if len(candidates) > _FEW else None
        if curve is not None and curve.best_rate(num_tokens, num_tokens + max_drafted) < _MIN_GAIN * curve.rate(
            num_tokens
        ):
            return nothing  # not even if every token were accepted: no sequence is looked up
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
