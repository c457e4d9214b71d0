"""Options from a file and from the environment. A variable overrides the file, and a flag overrides both."""

import difflib
import json
import os
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from cyclopts import UNSET, App, ArgumentCollection, UnknownOptionError
from cyclopts.config import Dict, Env

from quire.cli.pasted_flags import RARE_FLAG
from quire.cli.streams import describe
from quire.errors import ConfigError
from quire.vllm_rare_options import RARE_OPTIONS

PREFIX = "QUIRE_"
_CONFIG = "--config"
_SECRETS = ("api_key",)


def read_configuration(app: App, arguments: Sequence[str]) -> None:
    """Let `app` read options from the file that `arguments` name with --config, and from QUIRE_* variables.

    Only a command with the option config reads the file. Raises `ConfigError` for a file that cannot be read.
    """
    if os.environ.get(f"{PREFIX}PORT", "").startswith("tcp://"):
        del os.environ[f"{PREFIX}PORT"]  # Kubernetes sets it for a service of the name quire
    sources: list[Any] = [Env(PREFIX, command=False, show=False)]
    path = _value_of(arguments, _CONFIG) or os.environ.get(f"{PREFIX}CONFIG")
    if path:
        sources.append(lambda app, commands, given: _add_file(Path(path), app, commands, given))
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


def _add_file(path: Path, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Add the options of a file to `arguments`, unless the command reads none."""
    names = [name for argument in arguments for name in argument.names]
    if _CONFIG not in names:
        return
    options = _options_of(path)
    try:
        Dict(options, source=str(path), use_commands_as_keys=False)(app, commands, arguments)
    except UnknownOptionError as error:
        unknown = str(error.token.keyword).strip("[]")
        known = [name.removeprefix("--") for name in names]
        near = difflib.get_close_matches(unknown.replace("_", "-"), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; quire serve --help lists them"
        raise ConfigError(f"config: {path} has {unknown!r}, which is no option{hint}") from None


def _options_of(path: Path) -> dict[str, Any]:
    """The options in a file, each with a value as a flag takes it: an object is its JSON. Raises `ConfigError`."""
    table = _read(path)
    options: dict[str, Any] = {}
    rare: dict[str, Any] = {}
    for key, value in table.items():
        if not isinstance(key, str):
            raise ConfigError(f"config: {path} has the key {key!r}; keys are names of options, such as max-num-seqs")
        if key == "serve":
            raise ConfigError(f"config: {path} has the table serve; write its options at the top of the file")
        if (name := key.replace("-", "_")) in RARE_OPTIONS:
            rare[name] = value
        elif value is not None:  # YAML's null leaves an option unset
            options[key] = json.dumps(value, default=str) if isinstance(value, dict) else value
    return {**options, **({RARE_FLAG.removeprefix("--"): json.dumps(rare, default=str)} if rare else {})}


def _read(path: Path) -> dict[Any, Any]:
    reader = _FORMATS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"config is {path}; the name of the file must end in {', '.join(_FORMATS)}")
    if not path.is_file():
        raise ConfigError(f"config is {path}, which is no file")
    try:
        table = reader(path.read_text(encoding="utf-8"))
        json.dumps(table, default=str, skipkeys=True)  # a text of YAML may hold itself
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"config: {path} cannot be read: {describe(error)}") from None
    except Exception as error:  # whatever the parser of the format raises
        raise ConfigError(f"config: {path} cannot be read: {' '.join(str(error).split())}") from None
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise ConfigError(f"config: {path} holds no table of options")
    return table


def _read_yaml(text: str) -> Any:
    from yaml import safe_load  # a third of the time of --help

    return safe_load(text)


_FORMATS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": _read_yaml, ".yml": _read_yaml}


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
    """Print every option with its value and where it is from, and end. A value of a wrong type is an error."""
    for argument in arguments:
        if argument.tokens:
            argument.convert()
    for argument in arguments:
        name = argument.name.removeprefix("--")
        if name in ("config", "show-config") or (not argument.show and not argument.tokens):
            continue
        values = [token.value if token.implicit_value is UNSET else token.implicit_value for token in argument.tokens]
        if values and argument.field_info.name in _SECRETS:
            values = ["…"] * len(values)
        source = argument.tokens[0].source if argument.tokens else "default"
        default = argument.field_info.default
        shown = ", ".join(map(str, values)) if values else "unset" if default in (None, (), "") else default
        print(f"{name} = {shown}  ({'flag' if source == 'cli' else source})")
    raise SystemExit(0)
