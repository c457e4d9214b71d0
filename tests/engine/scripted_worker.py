"""A process behind an `Expendable` that does what each question says: `python -m tests.engine.scripted_worker FD`.

A question holds "fault|times|file": the fault is there for the first `times` processes that meet it, which are counted
in the file. Every other answer is the frame that the environment's ANSWER holds in hexadecimal. Nothing is imported
that takes time.
"""

import os
import re
import signal
import socket
import struct
import sys
import time

SIGNALS = {
    "killed": signal.SIGKILL,
    "crashed": signal.SIGSEGV,
    "stopped": signal.SIGSTOP,
    "out of CPU time": signal.SIGXCPU,
}
REPLIES = {
    "garbage": b"\x00\x00\x00\x03\xc1\xff\x00",
    "an empty message": b"\x00\x00\x00\x00",
    "a length without end": b"\x7f\xff\xff\xffHTTP/1.1 200 OK\r\n",
}


def act(fault: str, connection: socket.socket) -> None:
    if fault in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault])
    elif fault in REPLIES:
        connection.sendall(REPLIES[fault])
    elif fault == "exits":
        os._exit(0)
    elif fault == "raises":
        raise MemoryError
    elif fault == "closes and lives on":
        connection.close()
    while fault == "late and busy":
        pass
    time.sleep(60)


def main(fd: int) -> None:
    connection, answer, received = socket.socket(fileno=fd), bytes.fromhex(os.environ["ANSWER"]), b""
    while data := connection.recv(1 << 20):
        received += data
        while len(received) >= 4 and len(received) >= (end := 4 + struct.unpack(">I", received[:4])[0]):
            body, received = received[:end], received[end:]
            if found := re.search(rb"<(.*)\|(\d+)\|(.*)>", body):
                fault, times, file = (part.decode() for part in found.groups())
                with open(file, "a+") as seen:
                    if seen.tell() < int(times):
                        seen.write("x")
                        seen.flush()
                        act(fault, connection)
            connection.sendall(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
