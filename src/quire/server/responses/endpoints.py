"""/v1/responses: create, retrieve, delete and cancel responses, and list their input."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

from msgspec.structs import replace

from quire.errors import RequestError
from quire.server.answers import Answer, sse
from quire.server.backend import Engine
from quire.server.chat_turn import ChatTurn, chat_prompt, fitting_turn
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.errors import Refusal, as_request_error, naming
from quire.server.logprobs import LogprobFormat
from quire.server.params import check_absent
from quire.server.protocol import ChatCompletionRequest
from quire.server.query import read_ascending, read_whole_number
from quire.server.responses.items import (
    INCLUDES,
    SENT_NAMES,
    WITH_LOGPROBS,
    Item,
    input_items,
    is_hosted,
    is_reference,
    to_chat,
)
from quire.server.responses.protocol import (
    DeletedResponse,
    InputTokens,
    ItemList,
    Reasoning,
    ResponseObject,
    ResponsesRequest,
    TextConfig,
    TextFormat,
)
from quire.server.responses.renderer import ResponseRenderer
from quire.server.responses.runs import Run
from quire.server.responses.store import RUNNING, StoredResponse
from quire.server.store_faults import RetryPause, StoreFailedError
from quire.server.streaming import StreamForm
from quire.server.tools.request import check_count

T = TypeVar("T")
Save = Callable[[ResponseObject], Awaitable[None]]

_REFUSED = ("conversation", "prompt", "context_management", "moderation")
_MAX_PAGE = 100
_ATTEMPTS = 6
"""Attempts to keep the end of a response that runs in the background: for a minute."""
_FEW_ITEMS = 200
"""Items whose conversion takes no longer than a step of the event loop may take."""


async def create_response(context: RequestContext) -> None:
    request = await context.read(ResponsesRequest)
    context.check_generates()
    model = context.check_model(request.model)
    check_absent(request, _REFUSED)
    if request.background and request.store is False:
        raise RequestError("background needs store to be true: the reply is the stored response", param="background")
    _warn_of_includes(context, request)
    store, account = context.services.responses, context.client.account
    items, chat = await _read(context, request)
    with naming(SENT_NAMES):
        turn = (await fitting_turn(context, chat, truncates=request.truncation == "auto")).named(SENT_NAMES)
    renderer = ResponseRenderer(_blank(context, request, model, turn), _logprobs(context, request))
    answer = Answer(turn.generation, renderer, reader=turn.reader)
    context.scope["state"]["usage"] = answer.usage

    async def keep(response: ResponseObject) -> None:
        await store.save(account, StoredResponse(response, items))

    async def save(response: ResponseObject) -> None:
        if request.store is not False:
            try:
                await keep(response)
            except StoreFailedError as error:  # the client gets its answer all the same
                context.warn(f"the response is not kept: {error.message}")

    if context.asks_for_prompt:
        await context.reply(await answer.prompt_blocks(context.engine))
    elif request.background:
        await _start(context, answer, renderer, keep, stream=bool(request.stream))
    elif request.stream:
        events = _saved(answer.stream_events(context), renderer, save)
        await context.stream(events, answer.stream_form(marked=context.handover is not None))
    else:
        await context.reply_when_done(_whole(context.engine, answer, save))


async def count_tokens(context: RequestContext) -> None:
    """The tokens of the prompt that a response would answer."""
    request = await context.read(ResponsesRequest)
    context.check_model(request.model)
    check_absent(request, _REFUSED)
    _, chat = await _read(context, request)
    with naming(SENT_NAMES):
        prompt = await chat_prompt(context, chat)
    await context.reply(InputTokens(len(prompt.token_ids)))


async def _read(context: RequestContext, request: ResponsesRequest) -> tuple[list[Item], ChatCompletionRequest]:
    """The items of the request itself, and the chat that continues its conversation with them."""
    check_count(request.tools or ())
    store, account = context.services.responses, context.client.account
    given = request.input
    if isinstance(given, list) and any(map(is_reference, given)):
        named = await store.find_items(account, [item["id"] for item in given if is_reference(item)])
        found = iter(named)
        given = [next(found) if is_reference(item) else item for item in given]
    items: list[Item] = await _apart(input_items, given)
    hosted = {str(each["type"]) for each in (*(request.tools or ()), *items) if is_hosted(each)}
    if hosted:
        context.warn(f"{', '.join(sorted(hosted))} run on OpenAI's servers; they are left out")
    history = await store.history(account, request.previous_response_id) if request.previous_response_id else []
    with naming(SENT_NAMES):
        return items, await _apart(partial(to_chat, request), [*history, *items])


async def _apart(work: Callable[[Any], T], given: Any) -> T:
    """`work(given)`; of many items in a thread, since it takes a while and the event loop has others to serve."""
    many = isinstance(given, list) and len(given) > _FEW_ITEMS
    return await asyncio.to_thread(work, given) if many else work(given)


async def get_response(context: RequestContext) -> None:
    """The response, or with `stream=true` its events, if it runs in the background or ran lately."""
    stored = await _find(context)
    if context.query.get("stream") not in ("true", "1"):
        await context.reply(stored.response)
        return
    run = context.services.runs.find(context.client.account, stored.response.id)
    if run is None:
        raise RequestError(
            "stream: only a response that runs in the background, or ended lately, can be streamed", param="stream"
        )
    last_seen = read_whole_number(context.query, "starting_after", -1, low=0, high=2**31)
    await context.stream(run.read(last_seen + 1), StreamForm(_failure, b""))


async def delete_response(context: RequestContext) -> None:
    response_id = context.path_params["response_id"]
    run = _run_here(context, (await _find(context)).response)
    if run is not None:
        await context.services.runs.cancel(run)
    if not await context.services.responses.delete(context.client.account, response_id):
        raise _not_found(response_id)
    await context.reply(DeletedResponse(response_id))


async def cancel_response(context: RequestContext) -> None:
    stored = await _find(context)
    if not stored.response.background:
        raise RequestError("only a response that was created with background can be cancelled", param="response_id")
    run = _run_here(context, stored.response)
    if run is not None and not run.finished:
        await context.services.runs.cancel(run)
        stored = await _find(context)
    await context.reply(stored.response)


def _run_here(context: RequestContext, response: ResponseObject) -> Run | None:
    """The run of a response that may still be changed. Raises `RequestError` if a server that
    shares the store generates it."""
    run = context.services.runs.find(context.client.account, response.id)
    if run is None and response.status in RUNNING and response.background:
        raise RequestError(
            f"this server does not generate {response.id!r}; send this to the one that does, or wait until it ends",
            param="response_id",
        )
    return run


async def list_input_items(context: RequestContext) -> None:
    stored = await _find(context)
    items, query = stored.items, context.query
    items = items if read_ascending(query) else items[::-1]
    if (after := query.get("after")) is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise RequestError(f"after is {after[:100]!r}, which is no item of this response", param="after")
        items = items[ids.index(after) + 1 :]
    limit = read_whole_number(query, "limit", 20, low=1, high=_MAX_PAGE)
    page = items[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    await context.reply(ItemList(page, first, last, has_more=len(items) > limit))


async def _whole(engine: Engine, answer: Answer, save: Save) -> object:
    response = await answer.whole(engine)
    assert isinstance(response, ResponseObject)
    await save(response)
    return response


async def _saved(
    events: AsyncGenerator[bytes, None], renderer: ResponseRenderer, save: Save
) -> AsyncGenerator[bytes, None]:
    """`events`, with the response saved before the client learns that it is complete."""
    async with aclosing(events):
        async for event in events:
            if renderer.response.status not in RUNNING:
                await save(renderer.response)
            yield event


async def _start(
    context: RequestContext, answer: Answer, renderer: ResponseRenderer, keep: Save, *, stream: bool
) -> None:
    """Generate in the background, and answer with the queued response or with the events as they come. A response that
    the store cannot keep is refused: nobody could retrieve it."""
    run = Run(renderer.response.id, context.client.account)
    engine, queued, kept = context.engine, renderer.response, asyncio.Event()
    refusals = list[StoreFailedError]()

    async def work() -> None:
        try:
            await keep(queued)
        except StoreFailedError as error:
            refusals.append(error)
            return
        finally:
            kept.set()
        try:
            async with aclosing(answer.events(engine)) as events:
                async for event in events:
                    if renderer.response.status not in RUNNING:
                        await _keep_patiently(keep, renderer.response)
                    run.add(event)
        except Exception as error:
            run.add(renderer.failure(as_request_error(error)))
            await _keep_patiently(keep, renderer.response)
        except BaseException:  # cancelled
            renderer.response = replace(renderer.response, status="cancelled")
            with suppress(StoreFailedError):  # it is in the log
                await keep(renderer.response)
            raise

    context.services.runs.start(run, work)  # may refuse: a response that never runs must not be kept as queued
    await kept.wait()
    for refusal in refusals:
        raise refusal
    if stream:
        await context.stream(run.read(0), StreamForm(_failure, renderer.done))
    else:
        await context.reply(queued)


async def _keep_patiently(keep: Save, response: ResponseObject) -> None:
    """Keep a response in which nobody would see a fault of the store: try some times."""
    pause = RetryPause()
    for _ in range(_ATTEMPTS):
        with suppress(StoreFailedError):  # it is in the log
            await keep(response)
            return
        await pause.wait()


def _blank(context: RequestContext, request: ResponsesRequest, model: str, turn: ChatTurn) -> ResponseObject:
    """The response before anything is generated."""
    params = turn.generation.params
    return ResponseObject(
        id=context.answer_id("resp_"),
        created_at=context.created(),
        model=model,
        status="queued" if request.background else "in_progress",
        output=[],
        background=bool(request.background),
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        metadata=request.metadata or {},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        reasoning=request.reasoning or Reasoning(),
        store=request.store is not False,
        temperature=params.temperature,
        text=TextConfig((request.text and request.text.format) or TextFormat()),
        tool_choice=request.tool_choice or "auto",
        tools=request.tools or [],
        top_logprobs=request.top_logprobs or 0,
        top_p=params.top_p,
        truncation=request.truncation or "disabled",
        user=request.user,
    )


def _warn_of_includes(context: RequestContext, request: ResponsesRequest) -> None:
    unknown = [name for name in dict.fromkeys(request.include or ()) if name not in INCLUDES]
    context.warn(*(f"include holds {name[:64]!a}, which is ignored" for name in unknown[:8]))


def _logprobs(context: RequestContext, request: ResponsesRequest) -> LogprobFormat | None:
    if not request.top_logprobs and WITH_LOGPROBS not in (request.include or ()):
        return None
    return LogprobFormat(context.tokenizer(), as_token_ids=False, num_top=request.top_logprobs or 0)


async def _find(context: RequestContext) -> StoredResponse:
    response_id = context.path_params["response_id"]
    stored = await context.services.responses.load(context.client.account, response_id)
    if stored is None:
        raise _not_found(response_id)
    return stored


def _not_found(response_id: str) -> Refusal:
    return Refusal(
        404,
        f"the response {response_id[:100]!r} is not kept here; it was not stored, was deleted, or is too old",
        code="response_not_found",
        param="response_id",
    )


def _failure(error: RequestError) -> bytes:
    return sse({"type": "error", "code": error.code, "message": error.message, "param": error.param}, "error")


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/responses",
        create_response,
        "A response to items",
        ResponsesRequest,
        ResponseObject,
        streams=True,
        queues=True,
    ),
    Endpoint("POST", "/v1/responses/input_tokens", count_tokens, "Tokens of a prompt", ResponsesRequest, InputTokens),
    Endpoint(
        "GET", "/v1/responses/{response_id}", get_response, "A stored response", reply=ResponseObject, streams=True
    ),
    Endpoint("DELETE", "/v1/responses/{response_id}", delete_response, "Delete it", reply=DeletedResponse),
    Endpoint(
        "POST", "/v1/responses/{response_id}/cancel", cancel_response, "End it in the background", reply=ResponseObject
    ),
    Endpoint("GET", "/v1/responses/{response_id}/input_items", list_input_items, "Items it answers", reply=ItemList),
)
