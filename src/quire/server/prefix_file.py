"""--prefix-file: prefixes that an operator wants computed once and kept, one JSON object per line.

    {"prompt": "You are a helpful assistant."}
    {"prompt_token_ids": [1, 15043, 29892]}
    {"messages": [{"role": "system", "content": "Answer in one sentence."}]}

A prompt is tokenised as /v1/completions does, messages go through the model's chat template without the opening of an
answer. The prefixes are findable under every API key's salt: they are the operator's text, known to be there, and so
tell nothing of any client.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from quire.errors import ConfigError, RequestError
from quire.server.auth import Doorkeeper
from quire.server.backend import Engine
from quire.server.settings import ServerSettings

MAX_FILE_BYTES = 64 * 2**20


class PrefixLine(msgspec.Struct, forbid_unknown_fields=True):
    """One line; exactly one field is given."""

    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None


def read_prefixes(path: Path) -> list[PrefixLine]:
    """The lines of a file that are not empty. Raises `ConfigError`, with the line, for anything else."""
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


async def register_prefixes(engine: Engine, settings: ServerSettings) -> int:
    """Register the prefixes of `settings.prefix_file`; returns how many, when the engine has accepted them all.

    Raises `ConfigError` for a file that cannot be read, at once, and for a prefix that the engine refuses, which it
    does when it has loaded.
    """
    if settings.prefix_file is None:
        return 0
    path = Path(settings.prefix_file)
    salts = Doorkeeper(settings).salts
    prefixes = read_prefixes(path)
    token_ids = []
    for index, prefix in enumerate(prefixes, 1):
        with _naming(path, index):
            token_ids.append(_token_ids(engine, prefix))
    for index, prefix_ids in enumerate(token_ids, 1):
        with _naming(path, index):
            await engine.register_prefix(prefix_ids, salts)
    return len(prefixes)


@contextmanager
def _naming(path: Path, index: int) -> Iterator[None]:
    """Turn a refusal into a `ConfigError` that names the file and the prefix."""
    try:
        yield
    except RequestError as error:
        raise ConfigError(f"prefix_file {path}, prefix {index}: {error.message}") from error


def _token_ids(engine: Engine, prefix: PrefixLine) -> list[int]:
    if prefix.prompt_token_ids is not None:
        return prefix.prompt_token_ids
    if engine.tokenizer is None:
        raise RequestError("the model has no tokenizer.json: give prompt_token_ids")
    if prefix.prompt is not None:
        return engine.tokenizer.encode(prefix.prompt)
    if engine.chat_template is None:
        raise RequestError("the model has no chat template: give prompt or prompt_token_ids")
    text = engine.chat_template.render(prefix.messages or [], add_generation_prompt=False)
    return engine.tokenizer.encode(text, add_special_tokens=False)
