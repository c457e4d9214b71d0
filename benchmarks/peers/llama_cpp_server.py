"""llama.cpp through its own server. Times include HTTP with clients on the same cores.

The server divides its context into equal slots when it starts, so it is restarted for every workload with as many slots
as its requests can use.
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.peers.peer_engine import NotOffered
from benchmarks.peers.workloads import WorkRequest

MAX_SLOTS = 16
"""Maximum slots. More made it slower on two cores."""
START_SECONDS = 120.0


def open_engine(model: Path) -> "LlamaCppServer":
    return LlamaCppServer(model)


class LlamaCppServer:
    """A server on a free port, and one client thread per request."""

    def __init__(self, model: Path) -> None:
        self._program = Path(sys.executable).parents[1] / "build" / "bin" / "llama-server"
        self._model = model
        self._server: subprocess.Popen[bytes] | None = None
        self._port = 0
        self.version = "llama-cpp-python 0.3.36's"
        self._start(num_slots=1, slot_len=512)

    def _start(self, *, num_slots: int, slot_len: int) -> None:
        self.close()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        threads = str(len(os.sched_getaffinity(0)))
        flags = {
            "-m": self._model,
            "--port": self._port,
            "-t": threads,
            "-tb": threads,
            "-np": num_slots,
            "-c": num_slots * slot_len,
            "-b": 2048,
            "-ub": 512,
            "--cache-ram": 0,
        }
        command = [str(self._program), *(str(word) for pair in flags.items() for word in pair)]
        command += ["--no-warmup", "-cb", "--offline"]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self._call("GET", "/health")
                return
            except (OSError, RuntimeError) as error:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self._program} did not start with {self._model}") from error
                time.sleep(0.01)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=1200)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(f"{path} answered {answer.status}: {text[:200]!r}")
        return json.loads(text)

    def generate(self, requests: Sequence[WorkRequest], *, n: int, temperature: float) -> list[int]:
        # It has no parallel samples: send n copies of the prompt, with its prompt cache on.
        copies = [request for request in requests for _ in range(n)]
        with ThreadPoolExecutor(len(copies)) as clients:
            return list(clients.map(lambda request: self._complete(request, temperature), copies))

    def _complete(self, request: WorkRequest, temperature: float) -> int:
        chain = {"samplers": ["temperature"]} if temperature > 0 else {"samplers": ["top_k"], "top_k": 1}
        body = {
            "prompt": request.prompt_token_ids,
            "n_predict": request.num_output_tokens,
            "ignore_eos": True,
            "temperature": temperature,
            "cache_prompt": True,
            **chain,
        }
        return int(self._call("POST", "/completion", body)["tokens_predicted"])

    def beam_search(self, requests: Sequence[WorkRequest], *, beam_width: int) -> list[int]:
        raise NotOffered("llama.cpp's server has no beam search")

    def reset(self, upcoming: Sequence[WorkRequest]) -> None:
        longest = max(len(request.prompt_token_ids) + request.num_output_tokens for request in upcoming)
        num_slots = 1 if len(upcoming) == 1 else MAX_SLOTS
        self._start(num_slots=num_slots, slot_len=-(-(longest + 1) // 256) * 256)
        self.generate([WorkRequest([7] * 64, 16)] * num_slots, n=1, temperature=0.0)

    def close(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait(30)
            self._server = None
