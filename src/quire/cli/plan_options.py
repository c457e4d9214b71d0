"""PlanOptions: the options of `quire plan` beside the engine's."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from quire.cli.options import OutputFile
from quire.errors import ConfigError

PROMPT, OUTPUT = 512, 128
"""Tokens of a request by default, as far as the context allows."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Options of `quire plan` beside the engine's. The docstrings are its help."""

    device: str = ""
    """A card or processor such as RTX-4090, H100 or ryzen-7950x (see --list-devices), or a file that --measure wrote.
    Left out, or cpu or cuda: this machine, without times."""
    num_devices: int | None = None
    """Devices that share the model; by default as few as hold it. More than one is a plan only."""
    list_devices: Annotated[bool, Parameter(negative=())] = False
    """List the devices known by name, with their figures and sources."""
    users: int | None = None
    """Users at once; by default several numbers, up to as many as fit."""
    prompt: int | None = None
    """Tokens of each prompt; by default 512, or what the context allows."""
    output: int | None = None
    """Tokens of each answer; by default 128, or what the context allows."""
    context: int | None = None
    """Tokens that each user holds; by default a prompt and its answer."""
    trace: str = ""
    """Trace of request lengths to simulate instead of users, as for `quire simulate`: a name or a file."""
    compare: bool = True
    """Show what other ways of storing weights and KV, and other devices, would change."""
    measure: OutputFile = None
    """Measure this machine's coefficients and write them to this file. Takes some minutes, in which nothing else should
    run."""
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False
    """Print the plan as JSON: sizes in bytes, times in seconds."""

    def check(self) -> None:
        """Raise `ConfigError` for a count below 1."""
        for name in ("num_devices", "context", "users", "prompt", "output"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
