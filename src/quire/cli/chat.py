"""`quire chat`: a conversation on the terminal, with a model of one's own or with any OpenAI-compatible server.

Ctrl-C stops the answer, not the program; what was said so far stays part of the conversation.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Annotated, Any, Protocol

from cyclopts import Parameter

from quire.cli.http_client import Target
from quire.cli.options import ModelArgument, flags
from quire.config import EngineConfig
from quire.errors import QuireError
from quire.sampling_params import SamplingParams

HISTORY = Path("~/.quire_history")
HELP = "/system TEXT sets the system prompt, /reset forgets the conversation, /exit ends; Ctrl-C stops an answer"

Messages = list[dict[str, str]]


class Partner(Protocol):
    """Somebody to talk to."""

    async def start(self) -> str:
        """Get ready; the name to show."""
        ...

    def answer(self, messages: Messages) -> AsyncGenerator[str, None]:
        """The next message, piece by piece; closing it stops the work."""
        ...

    async def stop(self) -> None: ...


@flags(EngineConfig, without=frozenset({"model", "seed"}))
def chat(
    model: ModelArgument = "",
    *,
    url: str | None = None,
    api_key: Annotated[str | None, Parameter(env_var="QUIRE_API_KEY")] = None,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    **options: Any,
) -> None:
    """Talk to a model on the terminal.

    Parameters
    ----------
    model
        Folder of a Hugging Face checkpoint, or a hub name; with --url the server's name for the model.
    url
        Talk to this server instead of loading a model, e.g. http://127.0.0.1:8000/v1.
    api_key
        The server's API key.
    system
        The system prompt.
    max_tokens
        Most tokens of an answer.
    temperature
        0 is greedy; the model's own default if left out.
    top_p
        Keep the smallest set of most likely tokens whose probabilities sum to at least this.
    seed
        Same seed, same answers.
    """
    chosen: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    SamplingParams(**given)
    config = EngineConfig.from_options({"model": model, "disable_log_stats": True, **options})
    partner = _Server(url, model, api_key, given) if url else _OwnModel(config, given)
    with asyncio.Runner() as runner:
        try:
            name = runner.run(partner.start())
            _Conversation(runner, partner, name, system).run()
        finally:
            runner.run(partner.stop())


class _Conversation:
    """The loop of asking and answering."""

    def __init__(self, runner: asyncio.Runner, partner: Partner, name: str, system: str | None) -> None:
        self._runner = runner
        self._partner = partner
        self._name = name
        self._system = system
        self._messages: Messages = []

    def run(self) -> None:
        """Until /exit or the end of input."""
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=True)
        _load_history()
        self._console.print(f"[bold]{self._name}[/]  [dim]{HELP}[/]")
        while (line := self._ask()) is not None:
            if not line:
                continue
            if not line.startswith("/"):
                self._answer(line)
            elif not self._obey(*line.partition(" ")[::2]):
                break
        _save_history()

    def _ask(self) -> str | None:
        try:
            return input("> ").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            self._console.print("[dim]/exit or Ctrl-D ends[/]")
            return ""

    def _obey(self, command: str, rest: str) -> bool:
        """Whether to go on."""
        match command:
            case "/exit" | "/quit":
                return False
            case "/reset":
                self._messages.clear()
                self._console.print("[dim]the conversation is forgotten[/]")
            case "/system":
                self._system = rest.strip() or None
                self._console.print(f"[dim]system prompt: {self._system or 'none'}[/]", markup=True)
            case _:
                self._console.print(f"[dim]{HELP}[/]")
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


class _OwnModel:
    """An engine of one's own, its computing in a child process."""

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
        prompt = tokenizer.encode(template.render(messages), add_special_tokens=False)
        params = SamplingParams(**{"max_tokens": None, **self._engine.default_params, **self._given})
        async with aclosing(self._engine.generate(prompt, params)) as outputs:
            async for output in outputs:
                for sample in output.outputs:
                    yield sample.text

    async def stop(self) -> None:
        await self._engine.shutdown()


class _Server:
    """Any server that speaks OpenAI's API."""

    def __init__(self, url: str, model: str, api_key: str | None, given: dict[str, Any]) -> None:
        self._target = Target(f"{url.rstrip('/')}/chat/completions", api_key)
        self._body = {**({"model": model} if model else {}), **given, "stream": True}
        self._name = model or url

    async def start(self) -> str:
        return self._name

    async def answer(self, messages: Messages) -> AsyncGenerator[str, None]:
        async with aclosing(self._target.events({**self._body, "messages": messages})) as events:
            async for event in events:
                for choice in event.get("choices", ()):
                    yield choice.get("delta", {}).get("content") or ""

    async def stop(self) -> None:
        pass


def _load_history() -> None:
    with suppress(ImportError, OSError):  # where there is no readline, or nothing to read
        import readline

        readline.set_history_length(1000)
        readline.read_history_file(HISTORY.expanduser())


def _save_history() -> None:
    with suppress(ImportError, OSError):
        import readline

        if sys.stdin.isatty():
            readline.write_history_file(HISTORY.expanduser())
