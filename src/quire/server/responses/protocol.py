"""Bodies of /v1/responses, with OpenAI's field names, and vLLM's for sampling."""

from typing import Any, Literal

from msgspec import Struct

from quire.server.protocol import Priority, Refused, Salt, StreamOptions


class TextFormat(Struct):
    """The constraint on the text: text, json_object, or json_schema with name and schema."""

    type: str = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(Struct):
    """Options of the text."""

    format: TextFormat | None = None
    verbosity: str | None = None
    """Has no effect."""


class Reasoning(Struct):
    """Options of the reasoning."""

    effort: str | None = None
    """Passed to the model's template. "none" turns thinking off where the template can."""
    summary: str | None = None
    """Has no effect: the reasoning itself is returned."""
    generate_summary: str | None = None


class SamplingFields(Struct, kw_only=True):
    """Fields that mean the same as those of a chat, and are passed on."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = None
    priority: Priority | None = None
    cache_salt: Salt | None = None
    user: Salt | None = None


class ResponsesRequest(SamplingFields, kw_only=True):
    """Body of /v1/responses."""

    input: str | list[dict[str, Any]] | None = None
    """A text, or items: messages, function_call, function_call_output, reasoning."""
    model: str | None = None
    instructions: str | None = None
    """A system message in front. It does not carry over to later responses."""
    previous_response_id: str | None = None
    """Continue this stored response."""
    store: bool | None = None
    """Keep the response (the default), so that others can continue it."""
    background: bool | None = None
    """Answer at once, and generate in the background."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    """message.output_text.logprobs adds log-probabilities. Others have no effect."""
    truncation: Literal["auto", "disabled"] | None = None
    """auto: leave out the oldest messages that do not fit the context."""
    metadata: dict[str, str] | None = None
    max_tool_calls: int | None = None
    """Has no effect: it counts calls of OpenAI's own tools."""
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: str | None = None
    client_metadata: dict[str, Any] | None = None
    conversation: Refused = None
    prompt: Refused = None
    context_management: Refused = None
    moderation: Refused = None


class InputTokensDetails(Struct):
    """Prompt tokens whose KV came from the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    """Tokens of the reasoning."""

    reasoning_tokens: int


class ResponseUsage(Struct):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(Struct):
    """Why a response ended early: max_output_tokens."""

    reason: str


class ResponseObject(Struct, kw_only=True):
    """Reply of /v1/responses."""

    id: str
    created_at: int
    model: str
    object: Literal["response"] = "response"
    status: str
    """queued, in_progress, completed, incomplete, failed or cancelled."""
    output: list[dict[str, Any]]
    """Items: reasoning, message and function_call."""
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str]
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: Reasoning
    service_tier: str = "default"
    store: bool = True
    temperature: float
    text: TextConfig
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]]
    top_logprobs: int = 0
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class DeletedResponse(Struct):
    """Reply of DELETE."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class InputTokens(Struct):
    """Reply of /v1/responses/input_tokens."""

    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


class ItemList(Struct):
    """A page of input items."""

    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"
