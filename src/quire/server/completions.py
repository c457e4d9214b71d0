"""/v1/completions: one or several prompts, as text or tokens, and what comes after each; whole or as a stream."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from quire.engine.tokenizer import Tokenizer
from quire.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from quire.server.exchange import Endpoint, Exchange
from quire.server.generation import Job, Tally
from quire.server.limits import check_lengths, check_work
from quire.server.logprobs import LogprobForms, prompt_logprobs
from quire.server.params import check_available, completion_params
from quire.server.prompts import split_prompts, tokenize
from quire.server.protocol import CompletionRequest, StreamOptions
from quire.server.responses import Completion, CompletionChoice, CompletionLogprobs
from quire.server.sender import sender_of

_encode = msgspec.json.Encoder().encode


async def create_completion(exchange: Exchange) -> None:
    request = await exchange.read(CompletionRequest)
    exchange.check_ready()
    model = exchange.check_model(request.model)
    check_available(request)
    tokenizer = exchange.tokenizer()
    params = completion_params(request, exchange.engine.default_params)
    prompts = split_prompts(request.prompt)
    check_work(prompts, params.num_samples, exchange.settings)
    special = request.add_special_tokens is not False
    token_ids = await tokenize(tokenizer, prompts, add_special_tokens=special)
    check_lengths(token_ids, params, exchange.engine.max_model_len)
    job = Job(token_ids, params, sender_of(request, exchange.client))
    answer = _Answer(f"cmpl-{uuid.uuid4().hex}", int(time.time()), model, request, prompts, params.n, tokenizer)
    if request.stream:
        await exchange.stream(answer.events(exchange, job))
    else:
        await exchange.reply_when_done(answer.whole(exchange, job))


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer in the making: what stays the same over its choices and events. Choice = prompt × n + sample."""

    id: str
    created: int
    model: str
    request: CompletionRequest
    prompts: Sequence[str | list[int]]
    n: int
    tokenizer: Tokenizer

    @property
    def drops_output(self) -> bool:
        """No tokens were asked for; the engine made one all the same, to have something to end with."""
        return self.request.max_tokens == 0

    async def whole(self, exchange: Exchange, job: Job) -> Completion:
        """The reply, once all samples of all prompts have ended."""
        tally = Tally()
        choices = []
        for at, output in enumerate(await job.whole(exchange.engine)):
            tally.add(at, output, dropped=self.drops_output)
            for sample in output.outputs:
                index = at * self.n + sample.index
                choices.append(self._choice(index, self._kept(sample), output, self._forms(), opens=True))
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=tally.usage())

    async def events(self, exchange: Exchange, job: Job) -> AsyncGenerator[bytes, None]:
        """The same as server-sent events; the first of a choice holds what is echoed of its prompt."""
        options = self.request.stream_options or StreamOptions()
        tally = Tally()
        firsts: dict[int, RequestOutput] = {}
        forms: dict[int, LogprobForms] = {}
        async with aclosing(job.run(exchange.engine)) as outputs:
            async for at, output in outputs:
                tally.add(at, output, dropped=self.drops_output)
                prompt = firsts.setdefault(at, output)
                chunks = []
                for delta in output.outputs:
                    if not self._tells(delta):
                        continue
                    index = at * self.n + delta.index
                    opens = index not in forms
                    form = forms.setdefault(index, self._forms())
                    chunk = self._chunk([self._choice(index, self._kept(delta), prompt, form, opens=opens)])
                    if options.include_usage:
                        chunk.usage = tally.usage() if options.continuous_usage_stats else None
                    chunks.append(b"data: " + _encode(chunk) + b"\n\n")
                if chunks:
                    yield b"".join(chunks)
        if options.include_usage:
            last = self._chunk([])
            last.usage = tally.usage()
            yield b"data: " + _encode(last) + b"\n\n"

    def _choice(
        self, index: int, delta: CompletionOutput, prompt: RequestOutput, forms: LogprobForms, *, opens: bool
    ) -> CompletionChoice:
        request = self.request
        text, token_ids, positions = (
            delta.text,
            delta.token_ids,
            list[PositionLogprobs | None](delta.logprobs or ()),
        )
        if opens and request.echo:
            text = self._prompt_text(index // self.n, prompt) + text
            if request.logprobs is not None and prompt.prompt_logprobs is not None:
                token_ids = prompt.prompt_token_ids + token_ids
                positions = prompt.prompt_logprobs + positions
        choice = CompletionChoice(index, text, self._logprobs(forms, token_ids, positions), delta.finish_reason)
        if delta.finished:
            choice.stop_reason = delta.stop_reason
        if request.return_token_ids:
            choice.token_ids = delta.token_ids
        if opens and request.return_token_ids:
            choice.prompt_token_ids = prompt.prompt_token_ids
        if opens and request.prompt_logprobs is not None and prompt.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(prompt.prompt_logprobs)
        return choice

    def _tells(self, delta: CompletionOutput) -> bool:
        """Whether a delta is worth an event; a token may hold only part of a character."""
        return bool(delta.text or delta.finished or delta.logprobs or self.request.return_token_ids)

    def _kept(self, delta: CompletionOutput) -> CompletionOutput:
        if not self.drops_output:
            return delta
        return CompletionOutput(index=delta.index, finish_reason="length" if delta.finished else None)

    def _prompt_text(self, index: int, prompt: RequestOutput) -> str:
        """As it was sent; decoded where tokens were sent or some were cut off."""
        sent = self.prompts[index]
        if isinstance(sent, str) and self.request.truncate_prompt_tokens is None:
            return sent
        return self.tokenizer.decode(prompt.prompt_token_ids, skip_special_tokens=False)

    def _logprobs(
        self, forms: LogprobForms, token_ids: list[int], positions: list[PositionLogprobs | None]
    ) -> CompletionLogprobs | None:
        return None if self.request.logprobs is None else forms.for_completion(token_ids, positions)

    def _forms(self) -> LogprobForms:
        as_token_ids = self.request.return_tokens_as_token_ids or False
        return LogprobForms(self.tokenizer, as_token_ids, self.request.logprobs or 0)

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
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
