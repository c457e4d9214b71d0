"""Bodies of requests, with OpenAI's and vLLM's field names.

Unknown fields are ignored, because proxies forward fields of their own; a header of the response names them. Fields
that would change the answer and that Quire cannot honour yet are in `NotAvailable`; a request that sets one is refused
by the field's name.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct

Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Salt = Annotated[str, Meta(max_length=256)]
Refused = Annotated[Any, Meta(description="Not available; refused unless null, false or empty.")]


class NotAvailable(Struct, kw_only=True):
    """Fields that Quire knows and cannot serve."""

    prompt_embeds: Refused = None
    logits_processors: Refused = None
    logprob_token_ids: Refused = None
    repetition_detection: Refused = None
    kv_transfer_params: Refused = None
    mm_processor_kwargs: Refused = None
    media_io_kwargs: Refused = None
    guided_decoding_backend: Refused = None


class WithoutEffect(NotAvailable, kw_only=True):
    """Fields of OpenAI that are accepted and change nothing."""

    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    verbosity: str | None = None
    prediction: Any = None
    request_id: str | None = None
    """Send the header x-request-id instead: it comes back."""


class StreamOptions(Struct):
    """What a stream reports besides the text."""

    include_usage: bool | None = None
    """A last event without choices holds the usage."""
    include_obfuscation: bool | None = None
    """Has no effect."""
    continuous_usage_stats: bool | None = None
    """Every event holds the usage so far."""


class JsonSchema(Struct):
    """OpenAI's wrapper of a JSON schema."""

    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    """Has no effect: the text always follows the schema, and objects are closed unless the schema opens them."""


class ResponseFormat(Struct):
    """OpenAI's constraint on the text."""

    type: str = "text"
    """text, json_object or json_schema."""
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None
    """With json_object: the schema of the object, as llama.cpp and others have it."""


class StructuredOutputs(Struct):
    """vLLM's constraint on the text. Exactly one of the first five fields is set."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None
    disable_additional_properties: bool | None = None
    """Default true: objects hold the properties that the schema lists, and no others."""
    structural_tag: Refused = None


class GenerateRequest(WithoutEffect, kw_only=True):
    """The fields that completions and chat completions share; None means the model's default."""

    model: str | None = None
    n: int | None = None
    best_of: int | None = None
    """Number of samples; the n with the highest cumulative log-probability are returned. Not with `stream`."""
    use_beam_search: bool | None = None
    """Beam search with `beam_width` beams (default: `best_of`, then n). Returns the best n."""
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    """true, false or "never", as in transformers."""
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: str | None = None
    """raw_logprobs (default): from the model's distribution. processed_logprobs: from the distribution sampled from."""
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    """The side that `truncate_prompt_tokens` removes tokens from: left (default) or right."""
    add_special_tokens: bool | None = None
    """Default: true for completions; false for chats, because the template writes special tokens."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    """The guided_ fields are older names for the fields of `structured_outputs`."""
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    priority: Priority | None = None
    """Lower runs first."""
    user: Salt | None = None
    """The tenant, if the server has no API keys."""
    cache_salt: Salt | None = None
    vllm_xargs: dict[str, str | bool | int | float] | None = None
    """Free-form values for logits processors, which get them as texts in `params.extra`."""
    """Only requests with the same salt and API key share prefix blocks."""
    echo: bool | None = None
    """Completions: put the prompt before the text. Chats: put the last message before it, if it is continued."""
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """In logprobs, write a token as token_id:N instead of its text."""


class CompletionRequest(GenerateRequest, kw_only=True):
    """Body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    suffix: str | None = None
    """Text after the gap that the completion fills, for models with tokens for it."""
    logprobs: int | bool | None = None
    """How many of the likeliest tokens to show for each position. A chat's true means 1 here, and false none."""

    def __post_init__(self) -> None:
        if isinstance(self.logprobs, bool):
            self.logprobs = 1 if self.logprobs else None


class Message(Struct, kw_only=True):
    """One message of a chat."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    """A text, or a list of parts of type text, and image_url for a model that reads images."""
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """Another name for `reasoning`."""


class ChatCompletionRequest(GenerateRequest, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """Continue the last message instead of starting a new one."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the model's template, such as enable_thinking."""
    documents: list[dict[str, Any]] | None = None
    """Texts for templates that answer from documents, usually objects with title and text."""
    reasoning_effort: str | None = None
    """Passed to the model's template. "none" also sets enable_thinking to false."""
    include_reasoning: bool | None = None
    """False leaves the reasoning out of the reply."""
    thinking_token_budget: int | None = None
    """Most tokens of reasoning; then the model must answer."""
    tools: list[dict[str, Any]] | None = None
    """Functions that the model may call."""
    tool_choice: str | dict[str, Any] | None = None
    """none, auto (the default), required, or an object that names a function."""
    parallel_tool_calls: bool | None = None
    """False: at most one call in a reply."""
    modalities: list[str] | None = None
    functions: Refused = None
    chat_template: Refused = None
    audio: Refused = None


class TokenizeRequest(Struct, kw_only=True):
    """Body of /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    """True by default for a prompt, False for messages."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = None
    chat_template: Refused = None


class DetokenizeRequest(Struct, kw_only=True):
    """Body of /detokenize."""

    tokens: list[int]
    model: str | None = None
