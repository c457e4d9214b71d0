"""/v1/completions: from one or several prompts, as text or tokens, to the text after each; whole or as a stream."""

import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from quire.engine.tokenizer import Tokenizer
from quire.outputs import CompletionOutput, PositionLogprobs
from quire.server.answers import Answer, Choice, Renderer, event_usage, sse
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.generation import Generation, UsageCounter
from quire.server.limits import check_lengths, check_work
from quire.server.logprobs import LogprobFormat, prompt_logprobs
from quire.server.params import check_available, completion_params
from quire.server.prompts import longest_prompt, split_prompts, tokenize
from quire.server.protocol import CompletionRequest, StreamOptions
from quire.server.replies import Completion, CompletionChoice
from quire.server.scheduling_info import scheduling_info


async def create_completion(context: RequestContext) -> None:
    request = await context.read(CompletionRequest)
    context.check_ready()
    model = context.check_model(request.model)
    check_available(request)
    tokenizer = context.tokenizer()
    params = completion_params(request, context.engine.default_params)
    prompts = split_prompts(request.prompt)
    check_work(prompts, params.num_samples, context.settings)
    special = request.add_special_tokens is not False
    token_ids = await tokenize(
        tokenizer, prompts, add_special_tokens=special, max_tokens=longest_prompt(params, context.engine.max_model_len)
    )
    check_lengths(token_ids, params, context.engine.max_model_len)
    renderer = CompletionRenderer(
        id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        request=request,
        options=request.stream_options or StreamOptions(),
        prompts=prompts,
        tokenizer=tokenizer,
    )
    generation = Generation(token_ids, params, scheduling_info(request, context.client))
    usage = UsageCounter(counts_output=not renderer.drops_output)
    answer = Answer(generation, renderer, bool(request.return_token_ids), usage)
    await answer.send(context, stream=bool(request.stream))


@dataclass(frozen=True, slots=True)
class CompletionRenderer(Renderer):
    """OpenAI's completion objects. The first event of a choice also holds the echoed prompt."""

    id: str
    created: int
    model: str
    request: CompletionRequest
    options: StreamOptions
    prompts: Sequence[str | list[int]]
    """As the client sent them."""
    tokenizer: Tokenizer
    _formats: dict[int, LogprobFormat] = field(default_factory=dict, init=False)
    """By choice: each counts its own `text_offset`."""

    @property
    def drops_output(self) -> bool:
        """The client asked for no tokens. The engine still generates one, because a request ends with a token."""
        return self.request.max_tokens == 0

    def opening(self, choice: Choice, usage: UsageCounter) -> Sequence[bytes]:
        return ()

    def delta(self, choice: Choice, delta: CompletionOutput, usage: UsageCounter) -> bytes:
        chunk = self._reply([self._choice(choice, delta, opens=not choice.num_events)])
        chunk.usage = event_usage(self.options, usage)
        return sse(chunk)

    def ending(self, choices: Collection[Choice], usage: UsageCounter) -> Sequence[bytes]:
        if not self.options.include_usage:
            return ()
        chunk = self._reply([])
        chunk.usage = usage.usage()
        return (sse(chunk),)

    def whole(self, choices: Sequence[Choice], usage: UsageCounter) -> Completion:
        reply = self._reply([self._choice(choice, choice.sample, opens=True) for choice in choices])
        reply.usage = usage.usage()
        return reply

    def _choice(self, choice: Choice, delta: CompletionOutput, *, opens: bool) -> CompletionChoice:
        request, prompt = self.request, choice.prompt
        if self.drops_output:
            delta = CompletionOutput(index=delta.index, finish_reason="length" if delta.finished else None)
        text, token_ids = delta.text, delta.token_ids
        positions = list[PositionLogprobs | None](delta.logprobs or ())
        if opens and request.echo:
            text = self._prompt_text(choice) + text
            if request.logprobs is not None and prompt.prompt_logprobs is not None:
                token_ids = prompt.prompt_token_ids + token_ids
                positions = prompt.prompt_logprobs + positions
        reply = CompletionChoice(choice.index, text, finish_reason=delta.finish_reason)
        if request.logprobs is not None:
            reply.logprobs = self._format(choice).for_completion(token_ids, positions)
        if delta.finished:
            reply.stop_reason = delta.stop_reason
        if request.return_token_ids:
            reply.token_ids = delta.token_ids
        if opens and request.return_token_ids:
            reply.prompt_token_ids = prompt.prompt_token_ids
        if opens and request.prompt_logprobs is not None and prompt.prompt_logprobs is not None:
            reply.prompt_logprobs = prompt_logprobs(prompt.prompt_logprobs)
        return reply

    def _prompt_text(self, choice: Choice) -> str:
        """The prompt as the client sent it; decoded if it was sent as tokens or was truncated."""
        sent = self.prompts[choice.prompt_index]
        if isinstance(sent, str) and self.request.truncate_prompt_tokens is None:
            return sent
        return self.tokenizer.decode(choice.prompt.prompt_token_ids, skip_special_tokens=False)

    def _format(self, choice: Choice) -> LogprobFormat:
        if choice.index not in self._formats:
            as_token_ids = self.request.return_tokens_as_token_ids or False
            self._formats[choice.index] = LogprobFormat(self.tokenizer, as_token_ids, self.request.logprobs or 0)
        return self._formats[choice.index]

    def _reply(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices)


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/completions",
        create_completion,
        "What comes after a prompt",
        CompletionRequest,
        Completion,
        streams=True,
    ),
)
