"""KV memory saved by sharing, measured in the engine: `python -m benchmarks.sharing [--plot FILE]`.

Parallel samples and beams of the bundled model, on prompts of held-out text with the lengths of the paper's traces (its
Fig. 11). The saving is the share of block-table entries that need no block of their own, averaged over the run (the
paper's Fig. 15). The paper's figures stand beside ours.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from quire.cli.bench_memory import measure_memory
from quire.cli.bench_workload import Workload, WorkloadOptions, make_workload
from quire.config import EngineConfig
from quire.engine.engine import Engine

TEXT = Path(__file__).parents[1] / "tests" / "data" / "held_out.txt"
WIDTHS = (2, 4, 6)
PAPER = {
    ("alpaca", "parallel"): ("6.1", "", "9.8"),
    ("alpaca", "beam"): ("37.6", "", "55.2"),
    ("sharegpt", "parallel"): ("16.2", "", "30.5"),
    ("sharegpt", "beam"): ("44.3", "", "66.3"),
}
"""Per cent saved at widths 2, 4, 6; the paper prints the ends of each range."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharing", description=__doc__)
    parser.add_argument("--num-prompts", type=int, default=48)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    print("| lengths | decoding | width | saved, % | paper, % | waste, % | copied blocks | mean requests |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    saved: dict[tuple[str, str], list[float]] = {}
    for dataset in ("alpaca", "sharegpt"):
        for decoding in ("parallel", "beam"):
            for width, printed in zip(WIDTHS, PAPER[dataset, decoding], strict=True):
                figures = measure(dataset, decoding, width, options.num_prompts)
                saved.setdefault((dataset, decoding), []).append(figures["saved_by_sharing_percent"])
                print(
                    f"| {dataset} | {decoding} | {width} | {figures['saved_by_sharing_percent']:.1f} | {printed} | "
                    f"{figures['waste_percent']:.1f} | {figures['num_block_copies']} | {figures['mean_running']:.1f} |",
                    flush=True,
                )
    if options.plot is not None:
        draw(saved, options.plot)


def measure(dataset: str, decoding: str, width: int, num_prompts: int) -> dict[str, Any]:
    engine = Engine(EngineConfig(num_blocks=8192, max_num_seqs=512, max_num_batched_tokens=1024), lambda line: None)
    work = make_workload(WorkloadOptions(dataset=dataset, num_prompts=num_prompts), max_len=1024, seed=0)
    assert engine.tokenizer is not None
    text = engine.tokenizer.encode(TEXT.read_text(), add_special_tokens=False)
    rng = random.Random(0)
    prompts = []
    for prompt in work.prompts:
        start = rng.randrange(len(text) - len(prompt))
        prompts.append(text[start : start + len(prompt)])
    samples = {"n": width} if decoding == "parallel" else {"beam_width": width}
    return measure_memory(engine, Workload(prompts, work.output_lens), **samples)


def draw(saved: dict[tuple[str, str], list[float]], file: Path) -> None:
    import matplotlib.pyplot as plt  # the bench extra

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for axis, decoding in zip(axes, ("parallel", "beam"), strict=True):
        for dataset in ("alpaca", "sharegpt"):
            axis.plot(WIDTHS, saved[dataset, decoding], marker="o", label=f"{dataset}, Quire")
            ends = [float(PAPER[dataset, decoding][0]), float(PAPER[dataset, decoding][2])]
            axis.plot((WIDTHS[0], WIDTHS[-1]), ends, linestyle=":", marker="x", label=f"{dataset}, paper")
        axis.set(xlabel="samples" if decoding == "parallel" else "beam width", xticks=WIDTHS, ylim=(0, 80))
        axis.legend(fontsize=7)
    axes[0].set_ylabel("KV memory saved, %")
    figure.savefig(file)


if __name__ == "__main__":
    main()
