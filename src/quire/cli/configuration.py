"""Options from a file and from the environment. A variable overrides the file, and a flag overrides both."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from cyclopts import App, ArgumentCollection
from cyclopts.config import Env, Toml, Yaml

from quire.cli.streams import describe
from quire.errors import ConfigError

PREFIX = "QUIRE_"
_FORMATS: dict[str, Callable[..., Any]] = {".toml": Toml, ".yaml": Yaml, ".yml": Yaml}
_SECRETS = ("api_key",)


def read_configuration(app: App, arguments: Sequence[str]) -> None:
    """Let `app` read options from the file that `arguments` name with --config, and from QUIRE_* variables.

    Raises `ConfigError` for a file that cannot be read.
    """
    if os.environ.get(f"{PREFIX}PORT", "").startswith("tcp://"):
        del os.environ[f"{PREFIX}PORT"]  # Kubernetes sets it for a service of the name quire
    sources: list[Any] = [Env(PREFIX, command=False, show=False)]
    path = _value_of(arguments, "--config") or os.environ.get(f"{PREFIX}CONFIG")
    if path:
        sources.append(_file(Path(path)))
    sources.append(_check_whole)
    if "--show-config" in arguments:
        sources.append(_show)
    app.config = sources


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == flag:
            return arguments[index + 1] if index + 1 < len(arguments) else None
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def _file(path: Path) -> Any:
    reader = _FORMATS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"config is {path}; the name of the file must end in {', '.join(_FORMATS)}")
    if not path.is_file():
        raise ConfigError(f"config is {path}, which is no file")
    file = reader(path, must_exist=True, use_commands_as_keys=False, source=str(path))
    try:
        options = file.config
    except Exception as error:  # whatever the parser of the format raises
        _check_text(path)
        raise ConfigError(f"config: {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        raise ConfigError(f"config: {path} holds no table of options")
    return file


def _check_text(path: Path) -> None:
    """Raise `ConfigError` for a file that is no text of UTF-8; parsers say that less clearly."""
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"config: {path} cannot be read: {describe(error)}") from None


def _check_whole(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Raise `ConfigError` for a fraction where a whole number belongs, which would be rounded without a word."""
    for argument in arguments:
        kinds = {argument.hint, *get_args(argument.hint)}
        if int not in kinds or float in kinds:
            continue
        for token in argument.tokens:
            if _is_fraction(token.value):
                place = "" if token.source == "cli" else f" from {token.source}"
                raise ConfigError(f"{argument.name} is {token.value}{place}; it must be a whole number")


def _is_fraction(text: str) -> bool:
    try:
        return "." in text and not float(text).is_integer()
    except ValueError:
        return False  # it is no number, and is refused as such


def _show(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Print every option with its value and where it is from, and end."""
    for argument in arguments:
        name = argument.name.removeprefix("--")
        if name in ("config", "show-config") or (not argument.show and not argument.tokens):
            continue
        values = [token.value if token.value else token.implicit_value for token in argument.tokens]
        if values and argument.field_info.name in _SECRETS:
            values = ["…"] * len(values)
        source = argument.tokens[0].source if argument.tokens else "default"
        default = argument.field_info.default
        shown = ", ".join(map(str, values)) if values else "unset" if default in (None, (), "") else default
        print(f"{name} = {shown}  ({'flag' if source == 'cli' else source})")
    raise SystemExit(0)
