"""/v1/completions: from one or several prompts, as text or tokens, to the text after each; whole or as a stream."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from quire.engine.tokenizer import Tokenizer
from quire.outputs import CompletionOutput, PositionLogprobs
from quire.server.answers import Answer, Choice, Renderer, choice_error, event_usage, sse
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.event_frame import GAP, EventFrame
from quire.server.fill_in import checked_marks, fill_in_prompt
from quire.server.generation import Generation, UsageCounter
from quire.server.limits import check_lengths, check_work
from quire.server.logprobs import LogprobFormat, prompt_logprobs
from quire.server.params import check_available, completion_params
from quire.server.prompts import longest_prompt, split_prompts, tokenize, truncated
from quire.server.protocol import CompletionRequest, StreamOptions
from quire.server.replies import Completion, CompletionChoice, CompletionLogprobs
from quire.server.scheduling_info import scheduling_info
from quire.server.text_offsets import TextOffsets, begun_character


async def create_completion(context: RequestContext) -> None:
    request = await context.read(CompletionRequest)
    context.check_generates()
    model = context.check_model(request.model)
    prompts = split_prompts(request.prompt)
    generation = await completion_generation(context, request, prompts)
    renderer = CompletionRenderer(
        id=context.answer_id("cmpl-"),
        created=context.created(),
        model=model,
        request=request,
        options=request.stream_options or StreamOptions(),
        prompts=prompts,
        tokenizer=context.tokenizer_if_any(),
        skip_special_tokens=generation.params.skip_special_tokens,
    )
    usage = UsageCounter(counts_output=not renderer.drops_output)
    answer = Answer(generation, renderer, bool(request.return_token_ids), usage)
    await answer.send(context, stream=bool(request.stream))


async def completion_generation(
    context: RequestContext,
    request: CompletionRequest,
    prompts: Sequence[str | list[int]],
    *,
    clips_output: bool = False,
) -> Generation:
    """The generation that `request` asks for. Raises `RequestError` if it cannot be served. With `clips_output` there
    is no limit by default, and one beyond the context becomes what the context holds."""
    check_available(request)
    max_model_len = context.engine.max_model_len
    shows_tokens = request.echo or request.logprobs is not None
    needs_text = shows_tokens or request.suffix or any(isinstance(prompt, str) for prompt in prompts)
    tokenizer = context.tokenizer() if needs_text else context.tokenizer_if_any()
    params = completion_params(request, context.engine.default_params)
    check_work(prompts, params.num_samples, context.settings)
    if request.suffix and tokenizer is not None:
        check_work([request.suffix], 1, context.settings, param="suffix")
        marks = checked_marks(tokenizer, "suffix")
        params = params.with_changes(stop_token_ids=(*params.stop_token_ids, *marks.stop_token_ids))
        texts, longest = [*prompts, request.suffix], longest_prompt(params, max_model_len)
        *prefixes, suffix = await tokenize(tokenizer, texts, add_special_tokens=False, max_tokens=longest)
        token_ids = [fill_in_prompt(tokenizer, marks, prefix, suffix, []) for prefix in prefixes]
    else:
        special = request.add_special_tokens is not False
        longest = longest_prompt(params, max_model_len)
        token_ids = await tokenize(tokenizer, prompts, add_special_tokens=special, max_tokens=longest)
    token_ids = truncated(token_ids, params, request.truncation_side, max_model_len)
    if request.max_tokens is None or clips_output:  # a default must not refuse a prompt near the end of the context
        room = max_model_len - max(map(len, token_ids))
        wanted = request.max_tokens if clips_output else params.max_tokens
        params = params.with_changes(max_tokens=max(1, params.min_tokens, min(wanted or room, room)))
    check_lengths(token_ids, params, max_model_len)
    return Generation(token_ids, params, scheduling_info(request, context))


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
    tokenizer: Tokenizer | None
    """None only where no text of a token is shown."""
    skip_special_tokens: bool
    _progress: dict[int, "_Progress"] = field(default_factory=dict, init=False)
    """By choice."""
    _frames: dict[int, EventFrame] = field(default_factory=dict, init=False)
    """By choice: an event that adds a text and nothing else."""

    @property
    def _only_texts_vary(self) -> bool:
        request = self.request
        return (
            request.logprobs is None
            and not (request.return_token_ids or self.options.continuous_usage_stats)
            and not self.drops_output
        )

    def _frame(self, choice: Choice, usage: UsageCounter) -> EventFrame:
        frame = self._frames.get(choice.index)
        if frame is None:
            chunk = self._reply([CompletionChoice(choice.index, GAP)])
            chunk.usage = event_usage(self.options, usage)
            frame = self._frames[choice.index] = EventFrame(sse(chunk))
        return frame

    @property
    def drops_output(self) -> bool:
        """The client asked for no tokens. The engine still generates one, because a request ends with a token."""
        return self.request.max_tokens == 0

    def opening(self, choice: Choice, usage: UsageCounter) -> Sequence[bytes]:
        return ()

    def delta(self, choice: Choice, delta: CompletionOutput, usage: UsageCounter) -> bytes:
        if choice.num_events and self._only_texts_vary and (text := choice.only_text(delta)) is not None:
            return self._frame(choice, usage).fill(text)
        chunk = self._reply([self._choice(choice, delta, opens=not choice.num_events)])
        chunk.usage = event_usage(self.options, usage)
        return sse(chunk)

    def text_events(self, choice: Choice, usage: UsageCounter) -> Callable[[str], bytes] | None:
        return self._frame(choice, usage).fill_one if self._only_texts_vary else None

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
        text = self._prompt_text(choice) + delta.text if opens and request.echo else delta.text
        reply = CompletionChoice(choice.index, text, finish_reason=delta.finish_reason, error=choice_error(delta))
        if request.logprobs is not None:
            reply.logprobs = self._logprobs(choice, delta, text, opens=opens)
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
        """The prompt as the client sent it; decoded if it was sent as tokens or was truncated. A character that it
        begins and does not end is part of the output, if the client wants any."""
        sent = self.prompts[choice.prompt_index]
        if isinstance(sent, str) and self.request.truncate_prompt_tokens is None:
            return sent
        assert self.tokenizer is not None
        token_ids = choice.prompt.prompt_token_ids
        text = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        num_begun = 0 if self.drops_output else len(begun_character(self.tokenizer, token_ids))
        return text[: len(text) - num_begun]

    def _logprobs(self, choice: Choice, delta: CompletionOutput, text: str, *, opens: bool) -> CompletionLogprobs:
        """The `logprobs` of an event with `text`, or of the whole choice."""
        assert self.tokenizer is not None
        progress = self._progress.setdefault(
            choice.index, _Progress(TextOffsets(self.tokenizer, self.skip_special_tokens))
        )
        progress.num_chars += len(text)
        token_ids, offsets = delta.token_ids, list[int]()
        positions = list[PositionLogprobs | None](delta.logprobs or ())
        prompt = choice.prompt
        if opens and self.request.echo:
            offsets = progress.offsets.of_prompt(prompt.prompt_token_ids, text.removesuffix(delta.text))
            if prompt.prompt_logprobs is not None:
                token_ids = prompt.prompt_token_ids + token_ids
                positions = prompt.prompt_logprobs + positions
            else:
                offsets = []
        offsets += progress.offsets.of_output(delta.token_ids, progress.num_chars if delta.finished else None)
        as_token_ids = self.request.return_tokens_as_token_ids or False
        form = LogprobFormat(self.tokenizer, as_token_ids, self.request.logprobs or 0)
        return form.for_completion(token_ids, positions, offsets)

    def _reply(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices)


@dataclass(slots=True)
class _Progress:
    """How far one choice is written."""

    offsets: TextOffsets
    num_chars: int = 0


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/completions",
        create_completion,
        "What comes after a prompt",
        CompletionRequest,
        Completion,
        streams=True,
        queues=True,
    ),
)
