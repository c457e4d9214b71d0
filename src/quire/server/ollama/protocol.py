"""Bodies of Ollama's API, with its field names."""

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from quire.server.protocol import Refused


class Options(Struct):
    """Options of sampling. Options that set up Ollama's own process have no effect."""

    num_predict: int | None = None
    """−1, −2 and nothing: as many tokens as the context holds."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_ctx: int | None = None
    num_keep: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    num_thread: Any = None
    numa: Any = None
    low_vram: Any = None
    f16_kv: Any = None
    logits_all: Any = None
    vocab_only: Any = None
    use_mmap: Any = None
    use_mlock: Any = None
    embedding_only: Any = None
    repeat_last_n: Any = None
    penalize_newline: Any = None
    tfs_z: Any = None
    typical_p: Any = None
    mirostat: Any = None
    mirostat_tau: Any = None
    mirostat_eta: Any = None


class Function(Struct):
    """A called function."""

    name: str
    arguments: dict[str, Any] | UnsetType = UNSET
    index: int | UnsetType = UNSET
    description: str | UnsetType = UNSET


class ToolCall(Struct):
    """One call. Its arguments are an object."""

    function: Function
    id: str | UnsetType = UNSET


class OllamaMessage(Struct):
    """One message of a chat."""

    role: str
    content: str | None = None
    thinking: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType | None = UNSET
    tool_name: str | UnsetType | None = UNSET
    tool_call_id: str | UnsetType | None = UNSET
    images: list[str] | UnsetType | None = UNSET
    """Files as base64."""


class GenerationFields(Struct, kw_only=True):
    """Fields of /api/chat and /api/generate."""

    model: str
    stream: bool | None = None
    """True by default."""
    format: str | dict[str, Any] | None = None
    """json, or a JSON schema."""
    options: Options | None = None
    think: bool | str | None = None
    """Whether the model reasons first, or how much: low, medium, high. False leaves the reasoning out."""
    keep_alive: float | str | None = None
    """Has no effect: the model stays loaded."""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    truncate: bool | None = None
    """False: refuse a chat that does not fit. Default: leave out its oldest messages."""
    shift: bool | None = None
    """Has no effect: a reply ends where the context does."""


class ChatRequest(GenerationFields, kw_only=True):
    """Body of /api/chat."""

    messages: list[OllamaMessage] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateRequest(GenerationFields, kw_only=True):
    """Body of /api/generate."""

    prompt: str | None = None
    suffix: str | None = None
    """Text after the gap that is filled."""
    system: str | None = None
    raw: bool | None = None
    """Continue the prompt itself, without the chat template."""
    images: list[str] | None = None
    """Files as base64; not with `raw`."""
    template: Refused = None
    context: Refused = None


class EmbedRequest(Struct, kw_only=True):
    """Body of /api/embed, and of /api/embeddings with `prompt`."""

    model: str
    input: str | list[str] | None = None
    prompt: str | None = None
    truncate: bool | None = None
    """False: refuse a text that does not fit. Default: keep its end."""
    dimensions: int | None = None
    options: Options | None = None
    keep_alive: float | str | None = None


class ShowRequest(Struct):
    """Body of /api/show."""

    model: str | None = None
    name: str | None = None
    """The old name of `model`."""
    verbose: bool | None = None


class Timing(Struct, kw_only=True):
    """Counts of tokens, and nanoseconds. Only the last line has them."""

    done_reason: str | UnsetType = UNSET
    """stop, length, load or unload."""
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET


class ChatLine(Timing, kw_only=True):
    """Reply of /api/chat, and each line of its stream."""

    model: str
    created_at: str
    message: OllamaMessage
    done: bool
    logprobs: list[dict[str, Any]] | UnsetType = UNSET


class GenerateLine(Timing, kw_only=True):
    """Reply of /api/generate, and each line of its stream."""

    model: str
    created_at: str
    response: str
    thinking: str | UnsetType = UNSET
    done: bool
    logprobs: list[dict[str, Any]] | UnsetType = UNSET


class EmbedReply(Struct):
    """Reply of /api/embed."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OldEmbedReply(Struct):
    """Reply of /api/embeddings."""

    embedding: list[float]


class Details(Struct):
    """What a model is."""

    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    parent_model: str = ""


class ModelEntry(Struct, kw_only=True):
    """One model, in the list of all or of those loaded."""

    name: str
    model: str
    size: int
    digest: str
    details: Details
    modified_at: str | UnsetType = UNSET
    expires_at: str | UnsetType = UNSET
    size_vram: int | UnsetType = UNSET
    context_length: int | UnsetType = UNSET


class ModelEntries(Struct):
    """Reply of /api/tags and /api/ps."""

    models: list[ModelEntry]


class ShownModel(Struct):
    """Reply of /api/show."""

    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaError(Struct):
    """Body of a reply that is no success, and a line of a stream that failed."""

    error: str
