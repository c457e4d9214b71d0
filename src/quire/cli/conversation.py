"""Conversation: questions that a person types or pipes in, and the answers of a partner.

Ctrl-C stops the answer, not the program. The part of the answer printed so far stays in the conversation. If standard
input is not a terminal, the output holds answers alone, and Ctrl-C and the first failure end the program.
"""

import asyncio
import os
import sys
from contextlib import aclosing, suppress

from rich.console import Console
from rich.markup import escape

from quire.cli.partners import Messages, Partner
from quire.errors import QuireError

HISTORY = os.path.expanduser("~/.quire_history")
HELP = (
    "/system TEXT sets the system prompt, /reset starts a new conversation, /exit ends; Ctrl-C stops an answer; "
    '"""…""" holds several lines, // begins a message with /'
)

_QUOTES = '"""'
"""Begin and end a message of several lines."""


class Conversation:
    """The loop of questions and answers."""

    def __init__(self, runner: asyncio.Runner, partner: Partner, name: str, system: str | None) -> None:
        self._runner = runner
        self._partner = partner
        self._name = name
        self._system = system
        self._messages: Messages = []
        self._typed = False
        """A person types; a script's first failure ends the program."""
        self._console = Console(highlight=False, soft_wrap=True)

    def run(self) -> None:
        """Run until /exit or the end of input. Raises a failed answer's error unless a person types."""
        self._typed = sys.stdin.isatty()
        if self._typed:
            _load_history()
            self._console.print(f"[bold]{escape(self._name)}[/]  [dim]{HELP}[/]")
        while (line := self._ask()) is not None:
            if not line:
                continue
            if line.startswith("//"):
                self._answer(line[1:])
            elif not line.startswith("/"):
                self._answer(line)
            elif not self._obey(*line.partition(" ")[::2]):
                break
        if self._typed:
            _save_history()

    def answer_once(self, text: str) -> None:
        """Print the answer to one message. Raises `QuireError` if it fails."""
        self._answer(text)

    def _ask(self) -> str | None:
        """The next message or command; "" if there is none, None at the end of input. The end of input also ends a
        message of several lines."""
        lines: list[str] = []
        try:
            line = self._read("> ").strip()
            if not line.startswith(_QUOTES):
                return line
            lines.append(line.removeprefix(_QUOTES))
            while not lines[-1].endswith(_QUOTES):
                lines.append(self._read("… ").rstrip())
        except EOFError:
            if self._typed:
                print()
            if not lines:
                return None
        except KeyboardInterrupt:
            if not self._typed:
                raise
            self._console.print("[dim]/exit or Ctrl-D ends[/]")
            return ""
        return "\n".join(lines).removesuffix(_QUOTES).strip()

    def _read(self, prompt: str) -> str:
        """A line of input. Only a person sees the prompt: a script's output holds answers alone."""
        return input(prompt if self._typed else "")

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
                self._console.print(f"system prompt: {self._system or 'none'}", style="dim", markup=False)
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
            if not self._typed:
                raise
            self._console.print(" [dim](stopped)[/]", end="")
        except QuireError as error:
            self._messages.pop()
            if not self._typed:
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


def _load_history() -> None:
    with suppress(ImportError, OSError):  # there may be no readline module and no file
        import readline

        # A pasted paragraph then arrives from input() as one text. Python turns this off.
        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_history_length(1000)
        readline.read_history_file(HISTORY)


def _save_history() -> None:
    with suppress(ImportError, OSError):
        import readline

        readline.write_history_file(HISTORY)
