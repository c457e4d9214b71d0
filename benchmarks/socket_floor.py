"""CPU time of one write for each token and stream, and nothing else: the floor under any server's streams.

    python -m benchmarks.socket_floor --streams 100,1000

A child process writes an event of a chat to every stream once a step, at the pace of `benchmarks.api_process`: with
bare sockets in a loop, and with the transports of the event loop that the server uses. This process reads.
"""

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time

TOKENS_PER_SECOND = 2000
"""Pace of all streams together, below what a server can send: then each token has an event of its own."""
STEPS = 40
EVENT = (
    b'b6\r\ndata: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1,'
    b'"model":"m","choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n\r\n'
)
WAYS = ("socket", "transport")


def write_to_sockets(listener: socket.socket, num_streams: int) -> float:
    """CPU seconds of one `send`, over all streams and steps."""
    streams = [listener.accept()[0] for _ in range(num_streams)]
    before = time.process_time()
    for _ in range(STEPS):
        for stream in streams:
            stream.send(EVENT)
        time.sleep(num_streams / TOKENS_PER_SECOND)
    return (time.process_time() - before) / (STEPS * num_streams)


async def write_to_transports(listener: socket.socket, num_streams: int) -> float:
    """CPU seconds of one `write` of a transport, over all streams and steps."""
    transports: list[asyncio.WriteTransport] = []
    complete = asyncio.Event()

    class Stream(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "write")
            transports.append(transport)  # type: ignore[arg-type]  # uvloop's derive from nothing
            if len(transports) == num_streams:
                complete.set()

    server = await asyncio.get_running_loop().create_server(Stream, sock=listener)
    await complete.wait()
    before = time.process_time()
    for _ in range(STEPS):
        for transport in transports:
            transport.write(EVENT)
        await asyncio.sleep(num_streams / TOKENS_PER_SECOND)
    taken = time.process_time() - before
    server.close()
    return taken / (STEPS * num_streams)


def write(way: str, num_streams: int) -> None:
    """The child: says its port, writes to as many streams as connect, and says what a write took."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(listener.getsockname()[1], flush=True)
    if way == "socket":
        print(write_to_sockets(listener, num_streams))
    else:
        import uvloop

        print(uvloop.run(write_to_transports(listener, num_streams)))


async def _read_all(port: int, num_streams: int) -> None:
    async def read() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while await reader.read(2**16):
            pass
        writer.close()

    await asyncio.gather(*(read() for _ in range(num_streams)), return_exceptions=True)


def measure(way: str, num_streams: int) -> float:
    """CPU seconds of one write, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.socket_floor", "--write", way, "--streams", str(num_streams)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        asyncio.run(_read_all(int(child.stdout.readline()), num_streams))
        return float(child.stdout.readline())


def print_floor(num_streams: int, repeats: int) -> None:
    """The median of each way, in turns."""
    rounds = [[measure(way, num_streams) for way in WAYS] for _ in range(repeats)]
    shown = (
        f"{way} {statistics.median(times) * 1e6:.1f}"
        for way, times in zip(WAYS, zip(*rounds, strict=True), strict=True)
    )
    print(f"a write to one of {num_streams} streams, µs of CPU: {', '.join(shown)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="100,1000")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write(given.write, int(given.streams))
        return
    for count in map(int, given.streams.split(",")):
        print_floor(count, given.repeats)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
