"""Compiles clients' grammars in a process of its own: `python -m quire.engine.grammar_process FD`.

Started by `GrammarChecker`. The process reads the vocabulary once and answers one question at a time. It compiles each
grammar in a fork and kills the fork at the time limit. A thread could not be killed, and this process stays ready for
the next grammar whatever the last one did. The process has no threads, so forking is safe. A fork does nothing else, so
the growth of its allocator is the grammar's size.
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
from quire.engine.group_signals import leave_to_parent
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
"""Address space of a fork, for grammars that exhaust memory before time."""
MAX_CPU_SECONDS = 2
"""CPU time after which the system ends an orphaned fork."""


def main(fd: int) -> None:
    leave_to_parent()
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
                case CheckGrammar(spec) if compiler is not None:
                    answer = _check(compiler, spec)
                case CheckGrammar():
                    assert refusal is not None, "the vocabulary comes first"
                    answer = GrammarChecked(error=refusal.message, code=refusal.code)
            connection.sendall(encode(answer))


def _check(compiler: Compiler, spec: StructuredOutputsParams) -> GrammarChecked:
    """Compile in a fork. Returns its answer, or the limit that it exceeded."""
    reader, writer = os.pipe()
    fork = os.fork()
    if not fork:
        _compile_and_exit(compiler, spec, writer)
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
        error=f"{spec.asked_as}: the {spec.kind} takes {limit}; make it simpler", code="invalid_grammar"
    )


def _compile_and_exit(compiler: Compiler, spec: StructuredOutputsParams, writer: int) -> None:
    """In the fork: compile, write the answer to the pipe, exit."""
    try:
        # Close the inherited sockets: the caller must see the parent end even while a fork is alive.
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
            grammar = compiler.compile(spec)
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
    """Bytes that malloc has allocated; the resident size where the C library cannot report them."""
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
