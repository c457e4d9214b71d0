"""`quire chat`: a conversation on the terminal, with a model that it loads or with any OpenAI-compatible server."""

import asyncio
from typing import Annotated, Any

from cyclopts import Parameter

from quire.cli.conversation import Conversation
from quire.cli.options import ModelArgument, flags, split
from quire.cli.partners import AnswerOptions, LocalModel, ServerPartner
from quire.config import EngineConfig
from quire.sampling_params import SamplingParams


@flags(AnswerOptions, EngineConfig)
def chat(
    model: ModelArgument = "",
    *,
    url: str | None = None,
    api_key: Annotated[str | None, Parameter(env_var="QUIRE_API_KEY")] = None,
    system: str | None = None,
    **options: Any,
) -> None:
    """Talk to a model on the terminal.

    Parameters
    ----------
    model
        Folder of a Hugging Face checkpoint, or a name as for quire pull. With --url: the server's name for the model.
    url
        Use this server instead of loading a model, e.g. http://127.0.0.1:8000/v1.
    api_key
        The server's API key.
    system
        The system prompt.
    """
    answer_options, engine_options = split(options, AnswerOptions, EngineConfig)
    SamplingParams(**answer_options)
    config = EngineConfig.from_options({"model": model, "disable_log_stats": True, **engine_options})
    if not url:
        config.make_folders()
    partner = ServerPartner(url, model, api_key, answer_options) if url else LocalModel(config, answer_options)
    with asyncio.Runner() as runner:
        try:
            name = runner.run(partner.start())
            Conversation(runner, partner, name, system).run()
        finally:
            runner.run(partner.stop())
