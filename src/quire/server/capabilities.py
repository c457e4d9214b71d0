"""What a model can do, in Ollama's words: clients and the page show only what it has."""

from quire.server.chat_turn import reply_format
from quire.server.endpoint import RequestContext
from quire.server.fill_in import find_marks


def capabilities(context: RequestContext) -> list[str]:
    """Names of what the engine of `context` can do, among completion, embedding, vision, tools, thinking and insert."""
    engine, config, tokenizer = context.engine, context.engine.model_config, context.tokenizer_if_any()
    if config.pooling is not None:
        return ["embedding"]
    found = ["completion", "embedding"]
    if engine.images is not None:
        found.append("vision")
    if tokenizer is not None and engine.chat_template is not None:
        found.append("tools")
        if reply_format(context).thinking is not None:
            found.append("thinking")
    if tokenizer is not None and find_marks(tokenizer) is not None:
        found.append("insert")
    return found
