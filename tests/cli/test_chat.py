"""`quire chat`: prompts to the model, commands, failures, and Ctrl-C, which stops only the answer."""

import builtins
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from quire.cli.commands import run
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine, bundled_tokenizer


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """Sets the lines that a person types; an exception among them is raised in their place."""
    monkeypatch.setattr("quire.cli.conversation.HISTORY", tmp_path / "history")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)

    def with_lines(*lines: str | BaseException) -> None:
        typed: Iterator[str | BaseException] = iter(lines)

        def read(prompt: str = "") -> str:
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)

    return with_lines


def prompts(engine: ScriptedEngine) -> list[str]:
    return [bundled_tokenizer().decode(call.prompt, skip_special_tokens=False) for call in engine.calls]


def test_conversation(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine(max_model_len=4096)
    say("Hello", "", "And then?", "/system Be brief.", "/reset", "Again", "/nonsense", "/exit", "never asked")
    with RunningServer(engine) as server:
        assert run(["chat", "--url", f"{server.url}/v1", "--system", "Be kind.", "--max-tokens", "99"]) == 0
    assert capsys.readouterr().out.count(ANSWER) == 3
    first, second, third = prompts(engine)
    assert "<|system|>Be kind." in first
    assert f"<|user|>Hello<|end|><|assistant|>{ANSWER}<|end|><|user|>And then?" in second
    assert "<|system|>Be brief." in third
    assert "Hello" not in third
    assert engine.calls[0].params.max_tokens == 99


def test_brackets_are_text(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine(max_model_len=4096)
    with RunningServer(engine) as server:
        say("/system Answer in [/b] and [red]tags[/red]", "Hello [/i]", "/no[/b]", "/exit")
        assert run(["chat", "--url", f"{server.url}/v1"]) == 0
        say("/exit")
        assert run(["chat", "a[/b]", "--url", f"{server.url}/v1"]) == 0
    shown = capsys.readouterr().out
    assert "system prompt: Answer in [/b] and [red]tags[/red]" in shown
    assert "a[/b]" in shown
    assert "<|user|>Hello [/i]" in prompts(engine)[0]


def test_a_refusal_does_not_end_it(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine(full=True)
    say("Hello", KeyboardInterrupt())
    with RunningServer(engine) as server:
        assert run(["chat", "--url", f"{server.url}/v1"]) == 0
    assert "9 requests are waiting" in capsys.readouterr().out


def test_interrupt_stops_the_answer(
    say: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(endless=True, delay=0.001, max_model_len=4096)
    shown = 0

    def show(text: str = "", **options: Any) -> None:
        nonlocal shown
        shown += 1
        if shown == 5:
            raise KeyboardInterrupt
        real_print(text, **options)

    real_print = print
    monkeypatch.setattr(builtins, "print", show)
    say("Talk without end", "And on")
    with RunningServer(engine) as server:
        run(["chat", "--url", f"{server.url}/v1", "--max-tokens", "20"])
    assert "(stopped)" in capsys.readouterr().out
    assert len(engine.calls) == 2
    assert "<|user|>And on" in prompts(engine)[1]
    assert engine.num_closed_early == 1


def test_several_lines_and_a_leading_slash(say: Any) -> None:
    engine = ScriptedEngine(max_model_len=4096)
    say('"""First line', "/not a command", 'last line"""', "//etc is a folder", '"""one line"""')
    with RunningServer(engine) as server:
        assert run(["chat", "--url", f"{server.url}/v1"]) == 0
    first, second, third = prompts(engine)
    assert "<|user|>First line\n/not a command\nlast line<|end|>" in first
    assert "<|user|>/etc is a folder<|end|>" in second
    assert "<|user|>one line<|end|>" in third


def test_a_server_that_is_not_there(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    say("never asked")
    assert run(["chat", "--url", "http://127.0.0.1:1/v1"]) == 1
    assert "no answer from http://127.0.0.1:1/v1" in capsys.readouterr().err


def test_a_script_gets_a_status(say: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    say("Hello", "And then?")
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with RunningServer(ScriptedEngine(full=True)) as server:
        assert run(["chat", "--url", f"{server.url}/v1"]) == 1
    assert "9 requests are waiting" in capsys.readouterr().err


def test_a_script_s_output_holds_answers_alone(
    say: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(max_model_len=4096)
    say("Hello", '"""Not closed', "by the end")
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with RunningServer(engine) as server:
        assert run(["chat", "--url", f"{server.url}/v1"]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n{ANSWER}\n"
    assert "<|user|>Not closed\nby the end<|end|>" in prompts(engine)[1]


def test_a_pasted_paragraph_is_one_message(tmp_path: Any) -> None:
    """On a real terminal, which marks what is pasted."""
    engine = ScriptedEngine(max_model_len=4096)
    terminal, line = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path), "TERM": "xterm"}
    shown = b""
    with RunningServer(engine) as server:
        command = [sys.executable, "-m", "quire", "chat", "--url", f"{server.url}/v1"]
        with subprocess.Popen(command, env=environment, stdin=line, stdout=line, stderr=line) as chat:
            os.close(line)
            while b"> " not in shown.rpartition(b"\n")[2]:
                shown += os.read(terminal, 4096)
            os.write(terminal, b"\x1b[200~First line\n/second line\nthird\x1b[201~\n")
            while ANSWER.encode() not in shown:
                shown += os.read(terminal, 4096)
            os.write(terminal, b"/exit\n")
            while chat.poll() is None:
                try:
                    os.read(terminal, 4096)
                except OSError:  # the other side is closed
                    break
            assert chat.wait(30) == 0
    os.close(terminal)
    (prompt,) = prompts(engine)
    assert "<|user|>First line\n/second line\nthird<|end|>" in prompt
