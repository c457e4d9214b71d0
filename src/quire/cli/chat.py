"""`quire chat`: a conversation on the terminal, with a model that it loads or with any OpenAI-compatible server.

Ctrl-C stops the answer, not the program. The part of the answer printed so far stays in the conversation. If standard
input is not a terminal, the first failure ends the program with an error.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from cyclopts import Parameter

from quire.cli.http_client import Target
from quire.cli.options import ModelArgument, flags, split
from quire.config import EngineConfig
from quire.errors import QuireError
from quire.sampling_params import SamplingParams

HISTORY = Path("~/.quire_history")
HELP = (
    "/system TEXT sets the system prompt, /reset starts a new conversation, /exit ends; Ctrl-C stops an answer; "
    '"""…""" holds several lines, // begins a message with /'
)

_QUOTES = '"""'
"""Begin and end a message of several lines."""

Messages = list[dict[str, str]]


class Partner(Protocol):
    """A model that answers: one in this program, or a server."""

    async def start(self) -> str:
        """Get ready. Returns the name to show. Raises `QuireError` if that is impossible."""
        ...

    def answer(self, messages: Messages) -> AsyncGenerator[str, None]:
        """The next message in pieces. Closing the generator stops the generation."""
        ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """Flags of `quire chat` that go into the sampling parameters of each answer."""

    max_tokens: int | None = None
    """Maximum tokens of an answer."""
    temperature: float | None = None
    """0 is greedy. Defaults to the model's generation_config.json."""
    top_p: float | None = None
    """Keep the smallest set of most likely tokens whose probabilities sum to at least this."""
    seed: int | None = None
    """Seed of the sampling: the same seed gives the same answers."""


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
    partner = _Server(url, model, api_key, answer_options) if url else _LocalModel(config, answer_options)
    with asyncio.Runner() as runner:
        try:
            name = runner.run(partner.start())
            _Conversation(runner, partner, name, system).run()
        finally:
            runner.run(partner.stop())


class _Conversation:
    """The loop of questions and answers."""

    def __init__(self, runner: asyncio.Runner, partner: Partner, name: str, system: str | None) -> None:
        self._runner = runner
        self._partner = partner
        self._name = name
        self._system = system
        self._messages: Messages = []

    def run(self) -> None:
        """Run until /exit or the end of input. Raises a failed answer's error unless a person types."""
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=True)
        _load_history()
        self._console.print(f"[bold]{self._name}[/]  [dim]{HELP}[/]")
        while (line := self._ask()) is not None:
            if not line:
                continue
            if line.startswith("//"):
                self._answer(line[1:])
            elif not line.startswith("/"):
                self._answer(line)
            elif not self._obey(*line.partition(" ")[::2]):
                break
        _save_history()

    def _ask(self) -> str | None:
        """The next message or command; "" if there is none, None at the end of input."""
        try:
            line = input("> ").strip()
            if not line.startswith(_QUOTES):
                return line
            lines = [line.removeprefix(_QUOTES)]
            while not lines[-1].endswith(_QUOTES):
                lines.append(input("… ").rstrip())
            return "\n".join(lines).removesuffix(_QUOTES).strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            self._console.print("[dim]/exit or Ctrl-D ends[/]")
            return ""

    def _obey(self, command: str, rest: str) -> bool:
        """Run a command. Returns whether the conversation continues."""
        match command:
            case "/exit" | "/quit":
                return False
            case "/reset":
                self._messages.clear()
                self._console.print("[dim]new conversation[/]")
            case "/system":
                self._system = rest.strip() or None
                self._console.print(f"[dim]system prompt: {self._system or 'none'}[/]", markup=True)
            case "/help":
                self._console.print(f"[dim]{HELP}[/]")
            case _:
                self._console.print(f"there is no command {command}; {HELP}", style="dim", markup=False)
        return True

    def _answer(self, line: str) -> None:
        said: list[str] = []
        self._messages.append({"role": "user", "content": line})
        try:
            self._runner.run(self._stream(said))
        except KeyboardInterrupt:
            self._console.print(" [dim](stopped)[/]", end="")
        except QuireError as error:
            self._messages.pop()
            if not sys.stdin.isatty():
                raise
            self._console.print(str(error), style="red", markup=False)
            return
        print()
        self._messages.append({"role": "assistant", "content": "".join(said)})

    async def _stream(self, said: list[str]) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        async with aclosing(self._partner.answer(system + self._messages)) as pieces:
            async for piece in pieces:
                said.append(piece)
                print(piece, end="", flush=True)


class _LocalModel:
    """A model that this program loads; it computes in a child process."""

    def __init__(self, config: EngineConfig, given: dict[str, Any]) -> None:
        from quire.engine.async_engine import AsyncLLM

        self._engine = AsyncLLM(config, report=lambda line: print(line, file=sys.stderr))
        self._given = given

    async def start(self) -> str:
        await self._engine.start()
        await self._engine.wait_ready()
        return self._engine.model_names[0]

    async def answer(self, messages: Messages) -> AsyncGenerator[str, None]:
        template, tokenizer = self._engine.chat_template, self._engine.tokenizer
        if template is None or tokenizer is None:
            raise QuireError("the model has no chat template; `quire generate` continues a text")
        prompt = tokenizer.encode(await template.render(messages), add_special_tokens=False)
        params = SamplingParams(**{"max_tokens": None, **self._engine.default_params, **self._given})
        async with aclosing(self._engine.generate(prompt, params)) as outputs:
            async for output in outputs:
                for sample in output.outputs:
                    yield sample.text

    async def stop(self) -> None:
        await self._engine.shutdown()


class _Server:
    """Any server with OpenAI's API."""

    def __init__(self, url: str, model: str, api_key: str | None, given: dict[str, Any]) -> None:
        self._target = Target(f"{url.rstrip('/')}/chat/completions", api_key)
        self._body = {**({"model": model} if model else {}), **given, "stream": True}
        self._name = model or url

    async def start(self) -> str:
        await self._target.check()
        return self._name

    async def answer(self, messages: Messages) -> AsyncGenerator[str, None]:
        async with aclosing(self._target.events({**self._body, "messages": messages})) as events:
            async for event in events:
                for choice in event.get("choices", ()):
                    yield choice.get("delta", {}).get("content") or ""

    async def stop(self) -> None:
        pass


def _load_history() -> None:
    with suppress(ImportError, OSError):  # there may be no readline module and no file
        import readline

        # A pasted paragraph then arrives from input() as one text. Python turns this off.
        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_history_length(1000)
        readline.read_history_file(HISTORY.expanduser())


def _save_history() -> None:
    with suppress(ImportError, OSError):
        import readline

        if sys.stdin.isatty():
            readline.write_history_file(HISTORY.expanduser())
