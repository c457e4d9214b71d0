"""Renders chat templates in a process of its own: `python -m quire.engine.template_process FD`.

Started by `ChatTemplateProcess`. A template is a program in the model's files, and its input comes from clients. The
system ends this process if one rendering takes too much CPU time, and gives it no more than `MAX_BYTES` of memory.
"""

import os
import resource
import socket
import sys

from quire.engine.chat_template import ChatTemplate
from quire.engine.group_signals import leave_to_parent
from quire.engine.messages import FrameBuffer, LoadTemplate, Rendered, RenderMessages, decode_to_renderer, encode
from quire.errors import CheckpointError, RequestError

MAX_CPU_SECONDS = 1
"""CPU time of one rendering, and of compiling the template, up to a second more: the limit is in whole seconds."""
MAX_BYTES = 2**30
"""Address space of the process."""


def main(fd: int) -> None:
    leave_to_parent()
    _limit(resource.RLIMIT_AS, MAX_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    connection = socket.socket(fileno=fd)
    frames = FrameBuffer()
    template: ChatTemplate | None = None
    while data := connection.recv(1 << 20):
        for body in frames.feed(data):
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + MAX_CPU_SECONDS)
            match decode_to_renderer(body):
                case LoadTemplate(folder):
                    try:
                        template, answer = ChatTemplate.from_folder(folder), Rendered()
                    except (CheckpointError, MemoryError, RecursionError) as error:
                        answer = Rendered(error=f"{type(error).__name__}: {error}")
                case RenderMessages(messages, options):
                    answer = _render(template, messages, options)
            connection.sendall(encode(answer))


def _render(template: ChatTemplate | None, messages: list[dict[str, object]], options: dict[str, object]) -> Rendered:
    if template is None:
        return Rendered(
            error="the model's chat template is broken; the server's log says why. Use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    try:
        return Rendered(template.render(messages, **options))  # type: ignore[arg-type]  # the keywords of `render`
    except RequestError as error:
        return Rendered(error=error.message, param=error.param, code=error.code)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
