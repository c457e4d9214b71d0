"""Distance of each part of a step from the machine's limits: `python -m benchmarks.roofline MODEL [MODEL ...]`.

Runs `benchmarks.steps` with the weights as the checkpoint stores them; a float32 checkpoint also in int8 and int4. Sets
the time of each part beside its work by the model's shape: operations (a product and its addition are two) and bytes
that must be read. Prints a table and, with `--plot`, draws operations per second against operations per byte below the
ceilings of the same run (S. Williams et al., "Roofline", CACM 2009).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.model_config import ModelConfig
from quire.quantization import METHODS

MARKERS = {
    "float32": ("o", "#1d5f8a"),
    "bfloat16": ("s", "#4a9d5b"),
    "int8": ("^", "#e0a526"),
    "int4": ("v", "#c8553d"),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One part of one kind of step."""

    model: str
    weights: str
    step: str
    part: str
    seconds: float
    operations: float
    read: float
    """Bytes of weights, or of keys and values."""

    @property
    def intensity(self) -> float:
        return self.operations / self.read


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, help="plot to this SVG file")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    points: list[Point] = []
    for folder in options.models:
        model = ModelConfig.from_folder(folder)
        dtype = model.checkpoint_dtype
        for quantization in (None, *METHODS) if dtype == "float32" else (None,):
            run = run_steps(folder, "--dtype", dtype, *(["--quantization", quantization] if quantization else []))
            runs.append(run)
            points += points_of(run, model, folder.name)
    ceilings = {name: max(run["ceilings"][name] for run in runs) for name in runs[0]["ceilings"]}
    print(f"best ceilings of the runs: {json.dumps(ceilings)}\n")
    print("| model | weights | step | part | ms | operations per byte | GOP/s | GB/s |\n" + "| --- " * 8 + "|")
    for point in points:
        gops, gbs = point.operations / point.seconds / 1e9, point.read / point.seconds / 1e9
        where = f"{point.model} | {point.weights} | {point.step} | {point.part}"
        print(f"| {where} | {point.seconds * 1e3:.2f} | {point.intensity:.1f} | {gops:.0f} | {gbs:.1f} |")
    if options.plot is not None:
        draw(points, ceilings, options.plot)


def run_steps(model: Path, *flags: str) -> dict[str, Any]:
    """The figures of `benchmarks.steps`, run in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "steps.json"
        command = [sys.executable, "-m", "benchmarks.steps", str(model), *flags, "--output", str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def points_of(run: dict[str, Any], model: ModelConfig, model_name: str) -> Iterator[Point]:
    """Work and time of each part of each kind of step."""
    weights = run["weights"]
    spec = model.spec
    matrices, head = spec.layer_parameters, spec.num_head_parameters
    stored_as = ("float32", weights) if weights in METHODS else (weights, None)
    matrix_bytes, head_bytes = spec.layer_bytes(*stored_as), spec.head_bytes(*stored_as)
    for name, parts in run["steps"].items():
        count = int(name.split()[0])
        decoding = name.endswith("rows")
        stored = run["context"] * count if decoding else count
        seen = stored if decoding else count * (count + 1) / 2  # keys over all queries, as the causal mask leaves them
        attention = float(seen * spec.operations_per_pair)
        kv_bytes = stored * spec.kv_bytes_per_token(run["kv_cache_dtype"])
        work = {"dense": (2.0 * matrices * count, matrix_bytes), "attention": (attention, kv_bytes)}
        if decoding:
            work["logits"] = (2.0 * head * count, head_bytes)
        for part, (operations, read) in work.items():
            yield Point(model_name, weights, name, part, parts[part] / 1e3, operations, read)


def draw(points: list[Point], ceilings: dict[str, float], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "quire", "font.size": 8, "axes.spines.top": False}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set(xscale="log", yscale="log", xlabel="operations per byte read", ylabel="GOP/s")
        low, high = (bound(point.intensity for point in points) for bound in (min, max))
        line = [low * (high / low) ** (step / 60) for step in range(61)]
        for name, style in (("fp32_gflops", "-"), ("bf16_gflops", ":"), ("int8_gops", "--")):
            roof = [min(ceilings[name], ceilings["read_gb_per_s"] * x) for x in line]
            axes.plot(line, roof, style, color="#333333", linewidth=1, label=name.split("_")[0] + " ceiling")
        for weights, (marker, color) in MARKERS.items():
            chosen = [point for point in points if point.weights == weights]
            if not chosen:
                continue
            axes.scatter(
                [point.intensity for point in chosen],
                [point.operations / point.seconds / 1e9 for point in chosen],
                s=[34 if point.part == "dense" else 18 for point in chosen],
                marker=marker,
                color=color,
                label=weights,
            )
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
