"""--prefix-file: prefixes that the server computes at start and keeps in the KV cache, one JSON object per line.

    {"prompt": "You are a helpful assistant."}
    {"prompt_token_ids": [1, 15043, 29892]}
    {"messages": [{"role": "system", "content": "Answer in one sentence."}]}

A prompt is tokenised as for /v1/completions. Messages go through the model's chat template without the opening of an
answer. Requests of every API key find the prefixes: they are the operator's text, so a cache hit reveals nothing about
another client.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from quire.errors import ConfigError, RequestError
from quire.server.auth import Authenticator
from quire.server.backend import Engine
from quire.server.settings import ServerSettings

MAX_FILE_BYTES = 64 * 2**20


class PrefixLine(msgspec.Struct, forbid_unknown_fields=True):
    """One line of the file. Exactly one field is set."""

    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None


def read_prefixes(settings: ServerSettings) -> list[PrefixLine]:
    """Lines of `settings.prefix_file`; none without a file. Raises `ConfigError` that names the malformed line."""
    if settings.prefix_file is None:
        return []
    path = Path(settings.prefix_file)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"prefix_file {path} has {path.stat().st_size} bytes; at most {MAX_FILE_BYTES} are read")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"prefix_file {path} cannot be read: {error.strerror}") from error
    prefixes = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prefix = msgspec.json.decode(line, type=PrefixLine)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"prefix_file {path}, line {number}: {error}") from error
        if sum(value is not None for value in (prefix.prompt, prefix.prompt_token_ids, prefix.messages)) != 1:
            raise ConfigError(f"prefix_file {path}, line {number}: give one of prompt, prompt_token_ids and messages")
        prefixes.append(prefix)
    return prefixes


async def register_prefixes(engine: Engine, settings: ServerSettings, prefixes: Sequence[PrefixLine]) -> None:
    """Register `prefixes`; returns when the engine has loaded and accepted them all.

    Raises `ConfigError` that names the prefix: at once if it cannot be tokenised, later if the engine refuses it.
    """
    salts = Authenticator(settings).salts
    token_ids = []
    for index, prefix in enumerate(prefixes, 1):
        with _naming(settings, index):
            token_ids.append(await _token_ids(engine, prefix))
    for index, prefix_ids in enumerate(token_ids, 1):
        with _naming(settings, index):
            await engine.register_prefix(prefix_ids, salts)


@contextmanager
def _naming(settings: ServerSettings, index: int) -> Iterator[None]:
    """Turn a refusal into a `ConfigError` that names the file and the prefix."""
    try:
        yield
    except RequestError as error:
        raise ConfigError(f"prefix_file {settings.prefix_file}, prefix {index}: {error.message}") from error


async def _token_ids(engine: Engine, prefix: PrefixLine) -> list[int]:
    if prefix.prompt_token_ids is not None:
        return prefix.prompt_token_ids
    if engine.tokenizer is None:
        raise RequestError("the model has no tokenizer: give prompt_token_ids")
    if prefix.prompt is not None:
        return engine.tokenizer.encode(prefix.prompt)
    if engine.chat_template is None:
        raise RequestError("the model has no chat template: give prompt or prompt_token_ids")
    text = await engine.chat_template.render(prefix.messages or [], add_generation_prompt=False)
    return engine.tokenizer.encode(text, add_special_tokens=False)
