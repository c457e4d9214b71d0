"""Flags made from the fields of option classes. Names, types, defaults and helps are written once, in the class."""

import ast
import inspect
import json
import os
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from cyclopts import Group, Parameter

from quire.cli.pasted_flags import RARE_FLAG
from quire.config import OPTION_ALIASES, EngineConfig
from quire.errors import ConfigError
from quire.server.settings import ServerSettings
from quire.simulation.settings import SimulationSettings
from quire.vllm_options import FOREIGN_OPTIONS, ForeignOption
from quire.vllm_rare_options import SHORT_FLAGS, TRANSLATED_OPTIONS

ModelArgument = Annotated[str, Parameter(show_default=False)]


def _check_folder(kind: object, path: Path | None) -> None:
    """Raise `ConfigError` before the work if its result can never be written."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError("It is a folder" if path.is_dir() else f"There is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError("It cannot be written here; give another place")


OutputFile = Annotated[Path | None, Parameter(validator=_check_folder)]
"""A file to write, whose folder must exist."""
OutputJson = Annotated[OutputFile, Parameter(help="Also write the result to this file, as JSON.")]

F = TypeVar("F", bound=Callable[..., Any])

_SIZES = (
    *("kv_cache_memory", "logprobs_memory", "grammar_memory", "swap_space", "disk_cache_size", "weights_cache_size"),
    *("state_memory", "max_body_size", "max_header_size", "batch_dir_size", "max_file_size"),
    "responses_store_size",
)
"""Sizes, given in bytes or as a text such as 4GiB."""
_TEXTS: dict[str, Any] = {
    **dict.fromkeys(_SIZES, int | str | None),
    "speculative_config": str | None,
    "kv_events_config": str | None,
    "kv_transfer_config": str | None,
    **dict.fromkeys(("max_model_len", "max_num_batched_tokens"), int | str | None),
}
"""Options that the config class parses itself, with the type that a flag takes."""
_ENVIRONMENT = {
    "api_key": "QUIRE_API_KEY",
    "traces_dir": "QUIRE_TRACES",
    "allow_runtime_lora": "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
}
_SEVERAL = frozenset({"lora_modules"})
"""Flags that take several values at once, as in vLLM."""
_TRANSLATED = ForeignOption((), "")
_RARE = RARE_FLAG.removeprefix("--").replace("-", "_")
_GROUPS = {
    EngineConfig: Group("Engine", sort_key=1),
    ServerSettings: Group("Server", sort_key=2),
    SimulationSettings: Group("Simulation", sort_key=1),
}
"""Headings of the help. Flags of other classes stand with the command's own parameters."""


def flags(*configs: type, without: frozenset[str] = frozenset({"model"})) -> Callable[[F], F]:
    """Replace a command's `**options` by one flag per field of `configs`. The command receives only the flags given.

    If two classes have a field of the same name, the flag is the first one's.
    """

    def decorate(command: F) -> F:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        made = [_flag(config, field) for config, field in _fields(configs) if field.name not in without]
        taken = {parameter.name for parameter in own + made}
        if EngineConfig in configs:
            hidden = {**FOREIGN_OPTIONS, **dict.fromkeys((*TRANSLATED_OPTIONS, _RARE), _TRANSLATED)}
            made += [_hidden_flag(*item) for item in hidden.items() if item[0] not in taken]
        command.__signature__ = signature.replace(parameters=own + made)  # type: ignore[attr-defined]
        return command

    return decorate


def split(options: dict[str, Any], *configs: type) -> list[dict[str, Any]]:
    """The given options, one dict per config. `configs` are in the order that `flags` got them.

    Options of vLLM that Quire lacks are with the engine's.
    """
    parts: dict[type, dict[str, Any]] = {config: {} for config in configs}
    for config, field in _fields(configs):
        if field.name in options:
            parts[config][field.name] = options[field.name]
    if EngineConfig in parts:
        known = {field.name for _, field in _fields(configs)}
        foreign = options.keys() & (FOREIGN_OPTIONS.keys() | TRANSLATED_OPTIONS.keys())
        parts[EngineConfig] |= {name: options[name] for name in foreign - known}
        parts[EngineConfig] |= json.loads(options.get(_RARE) or "{}")
    return list(parts.values())


@cache
def field_docs(config: type) -> dict[str, str]:
    """The docstring below each field, by name; a subclass overrides those of its base."""
    docs: dict[str, str] = {}
    for ancestor in reversed([cls for cls in config.__mro__ if is_dataclass(cls)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(ancestor))).body
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


@cache
def _field_types(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def _fields(configs: tuple[type, ...]) -> "list[tuple[type, Field[Any]]]":
    """(class, field) for every flag; each name once."""
    by_name: dict[str, tuple[type, Field[Any]]] = {}
    for config in configs:
        for field in filter(attrgetter("init"), fields(config)):
            by_name.setdefault(field.name, (config, field))
    return list(by_name.values())


def _flag(config: type, field: "Field[Any]") -> inspect.Parameter:
    kind = _TEXTS.get(field.name) or _field_types(config)[field.name]
    names = [f"--{old.replace('_', '-')}" for old, new in OPTION_ALIASES.items() if new == field.name]
    names += [SHORT_FLAGS[field.name]] if field.name in SHORT_FLAGS else []
    group: dict[str, Any] = {"group": _GROUPS[config]} if config in _GROUPS else {}  # None would hide the flag
    about = Parameter(
        help=field_docs(config).get(field.name, ""),
        alias=names,
        env_var=_ENVIRONMENT.get(field.name),
        show_default=field.default not in (None, (), "", MISSING),
        show_env_var=field.name in _ENVIRONMENT,
        negative_bool=() if field.default is False else None,
        negative_iterable=(),
        consume_multiple=field.name in _SEVERAL,
        **group,
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, about]
    )


def _hidden_flag(name: str, option: ForeignOption) -> inspect.Parameter:
    """A flag for an option of vLLM that Quire lacks. The help leaves it out; `EngineConfig.from_options` checks it."""
    kind: Any = bool | None if option.is_switch else int | float | str | None
    about = Parameter(show=False, alias=SHORT_FLAGS.get(name, ()))
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, about])
