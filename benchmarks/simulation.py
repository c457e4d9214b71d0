"""Speed of simulations on one core: steps and generated tokens per second of wall time, for each policy.

    python -m benchmarks.simulation [--repeats 3]

OPT-13B on one A100-40GB with a queue that is always full, the case with most decisions per step, on the lengths of
ShareGPT (batches of about 35 sequences) and Alpaca (about 190).
"""

import argparse
import statistics
import time

from quire.simulation.devices import DEVICES
from quire.simulation.model_shapes import MODEL_SHAPES
from quire.simulation.settings import POLICIES, SimulationSettings
from quire.simulation.simulate import run_simulation
from quire.simulation.trace import TRACES, find_trace, read_trace

NUM_REQUESTS = {"sharegpt_papermean": 2000, "alpaca_like": 8000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts")
    options = parser.parse_args()
    model, device = MODEL_SHAPES["OPT-13B"], DEVICES["A100-40GB"]
    print(
        "| policy | trace | mean batch | steps/s | generated tokens/s | spread |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, num_requests in NUM_REQUESTS.items():
        trace = read_trace(find_trace(name, TRACES))
        for policy in POLICIES:
            settings = SimulationSettings(trace=name, policy=policy, saturate=True, num_requests=num_requests)
            seconds = []
            for _ in range(options.repeats):
                started = time.perf_counter()
                figures = run_simulation(trace, model, device, settings)
                seconds.append(time.perf_counter() - started)
            middle = statistics.median(seconds)
            print(
                f"| {policy} | {name.split('_')[0]} | {figures['mean_batch']:.1f} | {figures['steps'] / middle:,.0f} | "
                f"{figures['generated_tokens'] / middle:,.0f} | {100 * (max(seconds) - min(seconds)) / middle:.0f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
