"""Flags made of the fields of a config class: names, types, defaults and docstrings are written once, in the class."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from cyclopts import Group, Parameter

from quire.config import OPTION_ALIASES, EngineConfig
from quire.server.settings import ServerSettings
from quire.simulation.settings import SimulationSettings

ModelArgument = Annotated[str, Parameter(show_default=False)]
OutputJson = Annotated[Path | None, Parameter(help="Also write the result to this file, as JSON.")]

F = TypeVar("F", bound=Callable[..., Any])

_SIZES = (
    *("kv_cache_memory", "logprobs_memory", "grammar_memory", "swap_space", "disk_cache_size", "weights_cache_size"),
    *("max_body_size", "max_header_size"),
)
"""Given in bytes or as a text such as 4GiB."""
_TEXTS: dict[str, Any] = {**dict.fromkeys(_SIZES, int | str | None), "speculative_config": str | None}
"""Options whose text the config class reads."""
_ENVIRONMENT = {"api_key": "QUIRE_API_KEY", "traces_dir": "QUIRE_TRACES"}
_GROUPS = {
    EngineConfig: Group("Engine", sort_key=1),
    ServerSettings: Group("Server", sort_key=2),
    SimulationSettings: Group("Simulation", sort_key=1),
}


def flags(*configs: type, without: frozenset[str] = frozenset({"model"})) -> Callable[[F], F]:
    """Replace a command's `**options` by one flag for each field of `configs`; it receives those that were given."""

    def decorate(command: F) -> F:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        made = [_flag(config, field) for config in configs for field in fields(config) if field.name not in without]
        command.__signature__ = signature.replace(parameters=own + made)  # type: ignore[attr-defined]
        return command

    return decorate


def split(options: dict[str, Any], *configs: type) -> list[dict[str, Any]]:
    """The given options by the config they belong to."""
    return [{f.name: options[f.name] for f in fields(config) if f.name in options} for config in configs]


def field_docs(config: type) -> dict[str, str]:
    """The docstring below each field that has one."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def _flag(config: type, field: "Field[Any]") -> inspect.Parameter:
    kind = _TEXTS.get(field.name) or get_type_hints(config)[field.name]
    names = [f"--{old.replace('_', '-')}" for old, new in OPTION_ALIASES.items() if new == field.name]
    about = Parameter(
        help=field_docs(config).get(field.name, ""),
        alias=names,
        group=_GROUPS[config],
        env_var=_ENVIRONMENT.get(field.name),
        show_default=field.default not in (None, (), "", MISSING),
        show_env_var=field.name in _ENVIRONMENT,
        negative_bool=() if field.default is False else None,
        negative_iterable=(),
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, about]
    )
