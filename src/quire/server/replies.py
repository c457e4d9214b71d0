"""Bodies of replies: OpenAI's objects, with vLLM's additional fields if the client asked for them.

A field that is UNSET is absent from the JSON. A field that is None is null, as in OpenAI's own replies.
"""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from quire.server.errors import ErrorDetail


class PromptTokensDetails(Struct):
    """Prompt tokens whose KV came from the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(Struct):
    """Tokens of the output that belong to the reasoning."""

    reasoning_tokens: int


class Usage(Struct):
    """Tokens of the prompts and of the output."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    """Present if the model reasoned."""


class TokenLogprob(Struct):
    """One token in the logprobs of a chat."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """The chosen token of a position, and the top tokens there."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Struct):
    """Logprobs of a chat choice."""

    content: list[ChosenLogprob] | None


class CompletionLogprobs(Struct):
    """Logprobs of a completion choice: parallel lists with one entry per token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class PromptLogprob(Struct):
    """One token in `prompt_logprobs`, as vLLM has it."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CalledFunction(Struct):
    """The function of a call, or the part of its arguments that an event adds."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Struct):
    """The part of a tool call that an event adds; the first one has id, type and name."""

    index: int
    function: CalledFunction
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ToolCallReply(Struct):
    """One tool call of a message."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class Delta(Struct):
    """The part of a chat choice that an event adds."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    """The same as `reasoning`, for clients that know this name."""
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct):
    """One choice in an event of a chat."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    error: ErrorDetail | UnsetType = UNSET


class ChatChunk(Struct):
    """One event of a chat."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class AssistantMessage(Struct):
    """The message of a chat choice."""

    content: str | None
    """None for a message that only calls tools."""
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    """The same as `reasoning`, for clients that know this name."""
    tool_calls: list[ToolCallReply] | UnsetType = UNSET


class ChatChoice(Struct):
    """One sample of a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | UnsetType = UNSET
    error: ErrorDetail | UnsetType = UNSET


class ChatCompletion(Struct):
    """Reply of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionChoice(Struct):
    """One sample of a completion, or the part of it that an event adds."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    error: ErrorDetail | UnsetType = UNSET
    """Why the sample failed, if its finish reason is error. Other samples are not affected."""


class Completion(Struct):
    """Reply of /v1/completions, and each of its events."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET


class ModelCard(Struct):
    """One model name that the server accepts."""

    id: str
    created: int
    root: str
    max_model_len: int
    capabilities: list[str] = []
    """What it can do, in Ollama's words; empty while it loads."""
    parent: str | None = None
    """The model that an adapter changes."""
    object: Literal["model"] = "model"
    owned_by: str = "quire"


class ModelList(Struct):
    """Reply of /v1/models."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokenized(Struct):
    """Reply of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Struct):
    """Reply of /detokenize."""

    prompt: str


class RenderedChat(Struct):
    """Reply of /v1/chat/completions/render."""

    prompt: str
    token_ids: list[int]
    count: int
    max_model_len: int


class AddedToken(Struct):
    """A token that is not made of others."""

    content: str
    special: bool


class TokenizerInfo(Struct):
    """Reply of /tokenizer_info."""

    vocab_size: int
    model_max_length: int
    special_tokens: dict[str, str]
    """Name, such as bos_token → text."""
    added_tokens_decoder: dict[str, AddedToken]
    chat_template: str | None


class Health(Struct):
    """Reply of /health: ready, stalled, loading, draining, restarting, down or dead; of /health/live: live."""

    status: str
    cause: str | UnsetType = UNSET
    """Why the engine is down, and until when."""


class Version(Struct):
    """Reply of /version."""

    version: str
