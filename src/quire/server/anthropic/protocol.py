"""Bodies of /v1/messages, with Anthropic's field names."""

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from quire.server.protocol import Refused


class InputMessage(Struct):
    """One message: a text, or blocks of type text, thinking, tool_use, tool_result."""

    role: str
    content: str | list[dict[str, Any]]


class Tool(Struct):
    """One function that the model may call."""

    name: str = ""
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    """Only custom: Anthropic's own tools run on its servers."""
    strict: bool | None = None
    cache_control: Any = None


class ToolChoice(Struct):
    """auto, any, none, or tool with a name."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct):
    """enabled, disabled or adaptive."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(Struct):
    """A JSON schema that the text follows."""

    type: str
    schema: dict[str, Any] | None = None


class OutputConfig(Struct):
    """Options of the output."""

    effort: str | None = None
    """Passed to the model's template."""
    format: OutputFormat | None = None


class Metadata(Struct):
    """Free-form metadata of the client."""

    user_id: str | None = None
    """The tenant, if the server has no API keys."""


class PromptFields(Struct, kw_only=True):
    """The fields that make the prompt."""

    model: str | None = None
    messages: list[InputMessage]
    system: str | list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None
    """Has no effect: every prefix is cached."""
    service_tier: str | None = None
    speed: str | None = None
    inference_geo: str | None = None
    context_management: Any = None
    """Has no effect."""
    betas: Any = None
    diagnostics: Any = None
    mcp_servers: Refused = None
    container: Refused = None


class MessagesRequest(PromptFields, kw_only=True):
    """Body of /v1/messages."""

    max_tokens: int
    """A limit beyond the context means as many tokens as it holds."""
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None


class CountRequest(PromptFields, kw_only=True):
    """Body of /v1/messages/count_tokens."""


class MessageUsage(Struct):
    """Tokens of a message; those read from the prefix cache are not among `input_tokens`."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class AnthropicMessage(Struct, kw_only=True):
    """Reply of /v1/messages."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    """Blocks: thinking, text, tool_use."""
    stop_reason: str | None = None
    """end_turn, max_tokens, stop_sequence, tool_use or model_context_window_exceeded."""
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(Struct):
    """Reply of /v1/messages/count_tokens."""

    input_tokens: int


class AnthropicErrorDetail(Struct):
    """Content of an error."""

    type: str
    message: str


class AnthropicError(Struct):
    """Body of a reply that is no success, and an event of a stream that failed."""

    error: AnthropicErrorDetail
    type: Literal["error"] = "error"
    request_id: str | UnsetType = UNSET
