"""Compiling what clients send, in a process of its own: `python -m quire.engine.grammar_process FD`.

Started by `GrammarDoor`, which ends it when a grammar takes too long: no thread could be ended, and a process that
serves others could not be. It answers one question at a time and remembers nothing of it.
"""

import os
import resource
import signal
import socket
import sys
from pathlib import Path

from quire.engine.grammars import read_compiler
from quire.engine.messages import CheckGrammar, FrameBuffer, GrammarChecked, LoadVocabulary, decode_to_checker, encode
from quire.errors import RequestError
from quire.grammar.cache import Compiler

MAX_BYTES = 4 * 2**30
"""Of address space, for a grammar that would rather fill the memory than the time."""


def main(fd: int) -> None:
    # As in the engine's process: only the API process decides what Ctrl-C means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS, (MAX_BYTES if hard == resource.RLIM_INFINITY else min(MAX_BYTES, hard), hard)
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
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
                    connection.sendall(encode(GrammarChecked()))
                case CheckGrammar(form):
                    try:
                        if compiler is None:
                            raise refusal or RequestError("the vocabulary comes first")
                        compiler.compile(form)
                        answer = GrammarChecked()
                    except RequestError as error:
                        answer = GrammarChecked(error.message, error.code)
                    connection.sendall(encode(answer))


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
