"""Compare the router's policies: in simulated clusters (hits, latency, balance), and the time of one decision.

python -m benchmarks.routing --replicas 8 --rate 0.6 --num-requests 96
python -m benchmarks.routing --replicas 1000 --rate 20 --num-requests 2000 --policies least-work,round-robin
python -m benchmarks.routing --trace mooncake_conversation --traces-dir DIR --replicas 8 --num-requests 1500
python -m benchmarks.routing --decisions --replicas 64
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable
from statistics import median

from quire.routing.fleet import Fleet
from quire.routing.policies import POLICIES, LeastWork, Prompt
from quire.simulation.cluster_settings import AGENTS, ClusterSettings
from quire.simulation.devices import find_device
from quire.simulation.model_shapes import find_model_shape
from quire.simulation.run_cluster import run_cluster
from quire.simulation.settings import SimulationSettings
from quire.simulation.trace import find_trace, read_trace

_COLUMNS = (
    ("requests_per_s", "req/s"),
    ("goodput_per_s", "goodput/s"),
    ("refused", "refused"),
    ("prefix_hit_pct", "hit %"),
    ("of_oracle_pct", "of oracle %"),
    ("of_equal_oracle_pct", "of oracle of equal capacity %"),
    ("ttft_p50", "TTFT p50 s"),
    ("ttft_p99", "TTFT p99 s"),
    ("most_work_to_mean", "most/mean work"),
    ("device_hours_per_1k", "device hours/1,000 good"),
    ("moved", "moved"),
    ("lost", "lost"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trace", default=AGENTS)
    parser.add_argument("--traces-dir", default=".")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32_768, help="of the prompts of --decisions")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--num-requests", type=int)
    parser.add_argument("--kv-slots", type=int, default=400_000)
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--device", default="H100")
    parser.add_argument("--event-delay", type=float, default=0.1)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--deaths", action="append", default=[], help="SECONDS:REPLICA")
    parser.add_argument("--rolling-update", type=float)
    parser.add_argument("--decisions", action="store_true")
    options = parser.parse_args()
    if options.decisions:
        measure_decisions(options.replicas, options.prompt_tokens)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Print one line per policy."""
    trace = None if options.trace == AGENTS else read_trace(find_trace(options.trace, options.traces_dir))
    settings = SimulationSettings(
        trace=options.trace,
        rate=options.rate,
        num_requests=options.num_requests,
        kv_slots=options.kv_slots,
        block_size=64,
        max_model_len=131_072,
        max_num_batched_tokens=8192,
    )
    model, device = find_model_shape(options.model), find_device(options.device)
    print(" | ".join(["policy", *(title for _, title in _COLUMNS), "CPU s"]))
    for policy in options.policies.split(","):
        cluster = ClusterSettings(
            cluster=options.replicas,
            routing=policy,
            event_delay=options.event_delay,
            deaths=tuple(options.deaths),
            rolling_update=options.rolling_update,
        )
        started = time.process_time()
        figures = run_cluster(trace, model, device, settings, cluster)
        shown = ["–" if figures[name] is None else f"{figures[name]:.2f}" for name, _ in _COLUMNS]
        print(" | ".join([policy, *shown, f"{time.process_time() - started:.0f}"]), flush=True)


def measure_decisions(num_replicas: int, num_tokens: int, block_size: int = 16) -> None:
    """Print microseconds of processor time of `LeastWork`, for prompts that replicas hold to different extents.

    Prompts come with their block hashes. Each is decided again and again, and once after other work has emptied the
    processor's caches. `Fleet.choose` also enters the prompt's blocks into the index, where they are known by then.
    """
    draw = random.Random(0)
    num_blocks = num_tokens // block_size
    kinds: tuple[tuple[str, Callable[[], list[int]]], ...] = (
        ("nothing is known", lambda: [0] * num_replicas),
        ("one replica holds all, the others the system prompt", lambda: [num_blocks, *[256] * (num_replicas - 1)]),
        ("eight replicas hold different lengths", lambda: [draw.randrange(num_blocks) for _ in range(8)]),
        ("every replica holds another length", lambda: [draw.randrange(num_blocks) for _ in range(num_replicas)]),
        ("every replica holds all", lambda: [num_blocks] * num_replicas),
    )
    print(f"{'replicas hold of the prompt':51} | loads   | p50 µs | p90 µs | p50 cold | p50 of Fleet.choose")
    for (title, lengths), busy in itertools.product(kinds, (False, True)):
        fleet = Fleet(LeastWork(), max_blocks=2**17)
        replicas = [fleet.join(f"replica-{number}") for number in range(num_replicas)]
        for replica in replicas if busy else ():
            replica.load.queued_tokens = draw.randrange(num_tokens)
            replica.load.total_tokens = draw.randrange(10**6, 2 * 10**6)
        prompts = []
        for _ in range(20):
            blocks = [draw.getrandbits(64) for _ in range(num_blocks)]
            for replica, length in zip(replicas, lengths(), strict=False):
                fleet.stored(replica.name, blocks[:length])
            prompts.append(Prompt(blocks, num_tokens, block_size))
        policy = LeastWork()

        def decide(prompt: Prompt) -> None:
            policy.choose(prompt, replicas, fleet.index)  # noqa: B023  # called at once

        def send(prompt: Prompt) -> None:
            work = fleet.choose(prompt)  # noqa: B023  # called at once
            assert work is not None
            fleet.end(work)  # noqa: B023  # called at once

        warm = processor_times(decide, prompts * 20)
        cold = processor_times(decide, prompts, empty_caches=True)
        whole = processor_times(send, prompts * 5)
        figures = (
            f"{median(warm):6.0f} | {warm[len(warm) * 90 // 100]:6.0f} | {median(cold):8.0f} | {median(whole):6.0f}"
        )
        print(f"{title:51} | {'unequal' if busy else 'none':7} | {figures}", flush=True)


def processor_times(act: Callable[[Prompt], None], prompts: list[Prompt], *, empty_caches: bool = False) -> list[float]:
    """Sorted microseconds of processor time, without what other processes take."""
    times = []
    for prompt in prompts:
        if empty_caches:
            bytearray(b"x") * 2**26
        started = time.thread_time()
        act(prompt)
        times.append(1e6 * (time.thread_time() - started))
    return sorted(times)


if __name__ == "__main__":
    main()
