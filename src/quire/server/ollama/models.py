"""/api/tags, show, ps and version: what Ollama's clients ask about models."""

import hashlib
from functools import lru_cache

from quire.dtypes import DTYPE_BYTES
from quire.errors import RequestError
from quire.model_config import ModelConfig
from quire.server.capabilities import capabilities
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.errors import Refusal
from quire.server.models import contexts_of
from quire.server.ollama.protocol import Details, ModelEntries, ModelEntry, ShownModel, ShowRequest
from quire.server.ollama.renderer import ERRORS, now
from quire.server.replies import Version

API_VERSION = "0.12.0"
"""The version of Ollama whose API this is: clients ask for it, and refuse old ones."""
_NEVER = "2318-01-01T00:00:00Z"
_STARTED = now()
_LEVELS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def checked_model(context: RequestContext, name: str | None) -> str:
    """The served name that `name` means. Ollama's clients add a tag."""
    if name is None:
        raise RequestError("model is missing; name a model of /api/tags", param="model")
    return context.check_model(name if name in context.model_names else name.removesuffix(":latest"))


async def list_models(context: RequestContext) -> None:
    context.tokenizer_if_any()
    await context.reply(ModelEntries([_entry(own, name) for own in contexts_of(context) for name in own.model_names]))


async def list_loaded(context: RequestContext) -> None:
    context.tokenizer_if_any()
    entries = []
    for own in contexts_of(context):
        for entry in [_entry(own, name) for name in own.model_names]:
            entry.expires_at, entry.size_vram, entry.context_length = _NEVER, 0, own.engine.max_model_len
            entries.append(entry)
    await context.reply(ModelEntries(entries))


async def show_model(context: RequestContext) -> None:
    request = await context.read(ShowRequest)
    asked = request.model or request.name
    names = (asked, (asked or "").removesuffix(":latest"))
    context = next((own for own in contexts_of(context) if set(names) & set(own.model_names)), context)
    context.tokenizer_if_any()
    name = checked_model(context, asked)
    engine, config = context.engine, context.engine.model_config
    family = _family(config)
    await context.reply(
        ShownModel(
            modelfile=f"FROM {name}\n",
            parameters="\n".join(f"{key} {value}" for key, value in engine.default_params.items()),
            template=engine.chat_template.source if engine.chat_template is not None else "",
            details=_details(config),
            model_info={
                "general.architecture": family,
                "general.parameter_count": config.spec.num_parameters,
                f"{family}.context_length": engine.max_model_len,
                f"{family}.embedding_length": config.hidden_size,
                f"{family}.block_count": config.num_layers,
                f"{family}.vocab_size": config.vocab_size,
            },
            capabilities=capabilities(context),
            modified_at=_STARTED,
        )
    )


async def get_version(context: RequestContext) -> None:
    await context.reply(Version(API_VERSION))


async def refuse_to_manage(context: RequestContext) -> None:
    path = context.scope["path"]
    raise Refusal(
        400, f"{path} is not available: the model is chosen when the server starts (quire serve)", code="not_available"
    )


def _entry(context: RequestContext, name: str) -> ModelEntry:
    config = context.engine.model_config
    size = config.spec.num_parameters * DTYPE_BYTES[config.checkpoint_dtype]
    return ModelEntry(
        name=name, model=name, size=size, digest=_digest(config), details=_details(config), modified_at=_STARTED
    )


def _details(config: ModelConfig) -> Details:
    family, level = _family(config), _LEVELS.get(config.checkpoint_dtype, config.checkpoint_dtype)
    return Details("safetensors", family, [family], _short(config.spec.num_parameters), level)


def _family(config: ModelConfig) -> str:
    for ending in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"):
        if config.architecture.endswith(ending):
            return config.architecture.removesuffix(ending).lower()
    return config.architecture.lower()


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


@lru_cache(maxsize=8)
def _digest(config: ModelConfig) -> str:
    return hashlib.sha256(repr(config).encode()).hexdigest()


ENDPOINTS = (
    Endpoint("GET", "/api/tags", list_models, "Ollama's list of models", reply=ModelEntries, errors=ERRORS),
    Endpoint("GET", "/api/ps", list_loaded, "Ollama's list of loaded models", reply=ModelEntries, errors=ERRORS),
    Endpoint("POST", "/api/show", show_model, "What a model is", ShowRequest, ShownModel, errors=ERRORS),
    Endpoint("GET", "/api/version", get_version, "The version of Ollama's API", reply=Version, errors=ERRORS),
    *(
        Endpoint(method, f"/api/{name}", refuse_to_manage, "Not available", errors=ERRORS)
        for method, name in (
            ("POST", "pull"),
            ("POST", "push"),
            ("POST", "create"),
            ("POST", "copy"),
            ("DELETE", "delete"),
        )
    ),
)
