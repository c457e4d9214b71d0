"""Compiling what clients send, in a process of its own: `python -m quire.engine.grammar_process FD`.

Started by `GrammarChecker`. It reads the vocabulary once and answers one question at a time. Each grammar is compiled
in a fork, which is killed when it takes too long: no thread could be ended, and this process is there for the next
grammar, whatever the last one did. There are no threads here, so forking is safe. And since a fork does nothing else,
what its allocator gave away is what the grammar takes.
"""

import ctypes
import os
import resource
import select
import signal
import socket
import sys
import time
from pathlib import Path

from quire.engine.grammars import read_compiler
from quire.engine.messages import (
    CheckGrammar,
    FrameBuffer,
    GrammarChecked,
    LoadVocabulary,
    decode_from_checker,
    decode_to_checker,
    encode,
)
from quire.errors import RequestError
from quire.grammar.cache import Compiler
from quire.structured_outputs import StructuredOutputsParams

CHECK_SECONDS = 0.7
"""A grammar that takes longer to compile is refused."""
MAX_BYTES = 4 * 2**30
"""Of address space, for a grammar that would rather fill the memory than the time."""
MAX_CPU_SECONDS = 2
"""After which the system ends a fork that nobody is left to end."""


def main(fd: int) -> None:
    # As in the engine's process: only the API process decides what Ctrl-C means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=fd)
    frames = FrameBuffer()
    compiler: Compiler | None = None
    refusal: RequestError | None = None
    while data := connection.recv(1 << 20):
        for body in frames.feed(data):
            match decode_to_checker(body):
                case LoadVocabulary(folder, vocab_size, eos_token_ids):
                    try:
                        compiler = read_compiler(Path(folder), vocab_size=vocab_size, eos_token_ids=eos_token_ids)
                    except RequestError as error:
                        refusal = error
                    answer = GrammarChecked()
                case CheckGrammar(form) if compiler is not None:
                    answer = _check(compiler, form)
                case CheckGrammar():
                    assert refusal is not None, "the vocabulary comes first"
                    answer = GrammarChecked(error=refusal.message, code=refusal.code)
            connection.sendall(encode(answer))


def _check(compiler: Compiler, form: StructuredOutputsParams) -> GrammarChecked:
    """Compile in a fork. Returns what it says of the form, or why it could say nothing."""
    reader, writer = os.pipe()
    fork = os.fork()
    if not fork:
        _compile_and_exit(compiler, form, writer)
    os.close(writer)
    deadline = time.monotonic() + CHECK_SECONDS
    frames, limit = FrameBuffer(), f"more than {CHECK_SECONDS} s to compile"
    try:
        while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            data = os.read(reader, 1 << 16)
            if not data:
                limit = "too much memory"
                break
            for body in frames.feed(data):
                return decode_from_checker(body)
    finally:
        os.close(reader)
        os.kill(fork, signal.SIGKILL)
        os.waitpid(fork, 0)
    return GrammarChecked(
        error=f"{form.asked_as}: the {form.kind} takes {limit}; make it simpler", code="invalid_grammar"
    )


def _compile_and_exit(compiler: Compiler, form: StructuredOutputsParams, writer: int) -> None:
    """In the fork: write the answer into a pipe."""
    try:
        # Who asked is to notice if the process that was asked ends, though a fork of it may still be there.
        os.closerange(3, writer)
        os.closerange(writer + 1, 2**16)
        for limit, value in (
            (resource.RLIMIT_AS, MAX_BYTES),
            (resource.RLIMIT_CPU, MAX_CPU_SECONDS),
            (resource.RLIMIT_CORE, 0),
        ):
            _, hard = resource.getrlimit(limit)
            resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
        before = _allocated_bytes()
        try:
            grammar = compiler.compile(form)
            answer = GrammarChecked(num_bytes=max(0, _allocated_bytes() - before))
            del grammar
        except RequestError as error:
            answer = GrammarChecked(error=error.message, code=error.code)
        with open(writer, "wb") as pipe:
            pipe.write(encode(answer))
    finally:
        os._exit(0)


class _MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _allocated_bytes() -> int:
    """What malloc has given away in this process, and where the C library does not tell, what the process takes."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    mallinfo2.restype = _MallocInfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
