"""Log-probabilities as OpenAI writes them (lists for completions, objects for chats) and as vLLM does for prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

from quire.engine.tokenizer import Tokenizer
from quire.outputs import Logprob, PositionLogprobs
from quire.server.replies import (
    ChatLogprobs,
    ChosenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
)

_LOWEST = -9999.0
"""Written for minus infinity, the log-probability of a token that a filter removed: JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class LogprobFormat:
    """Writes log-probabilities."""

    tokenizer: Tokenizer
    as_token_ids: bool
    num_top: int

    def for_chat(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs]) -> ChatLogprobs:
        """The log-probabilities of a chat choice."""
        content = []
        for token_id, position in zip(token_ids, positions, strict=True):
            # The chosen token is an extra entry if it is not among the top tokens.
            likely = sorted(position.items(), key=lambda item: -item[1].logprob)[: self.num_top]
            chosen = self._entry(token_id, position[token_id])
            top = [self._entry(other, entry) for other, entry in likely]
            content.append(ChosenLogprob(chosen.token, chosen.logprob, chosen.bytes, top))
        return ChatLogprobs(content)

    def for_completion(
        self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None], offsets: list[int]
    ) -> CompletionLogprobs:
        """The log-probabilities of a completion choice, whose tokens begin at `offsets` of its text. A prompt's first
        token has none."""
        reply = CompletionLogprobs(text_offset=offsets, token_logprobs=[], tokens=[], top_logprobs=[])
        for token_id, position in zip(token_ids, positions, strict=True):
            text = self._text(token_id, position[token_id] if position else None)
            reply.tokens.append(text)
            reply.token_logprobs.append(_finite(position[token_id].logprob) if position else None)
            if reply.top_logprobs is not None:
                reply.top_logprobs.append(self._by_text(position) if position else None)
        return reply

    def _entry(self, token_id: int, entry: Logprob) -> TokenLogprob:
        text = self._text(token_id, entry)
        return TokenLogprob(text, _finite(entry.logprob), list(self.tokenizer.token_bytes(token_id)))

    def _by_text(self, position: PositionLogprobs) -> dict[str, float]:
        likely: dict[str, float] = {}
        for token_id, entry in position.items():
            # Two tokens may have the same text, as parts of characters do. Keep the first: it is the chosen one.
            likely.setdefault(self._text(token_id, entry), _finite(entry.logprob))
        return likely

    def _text(self, token_id: int, entry: Logprob | None) -> str:
        if self.as_token_ids:
            return f"token_id:{token_id}"
        if entry is not None and entry.decoded_token is not None:
            return entry.decoded_token
        return self.tokenizer.id_to_text(token_id)


def prompt_logprobs(positions: Sequence[PositionLogprobs | None]) -> PromptLogprobs:
    """The `prompt_logprobs` field, as vLLM has it."""
    return [
        None
        if position is None
        else {
            str(token_id): PromptLogprob(_finite(entry.logprob), entry.rank, entry.decoded_token)
            for token_id, entry in position.items()
        }
        for position in positions
    ]


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
