"""CPU seconds to the first token of models that are mapped, beside those of reading their files, in turns:

    python -m benchmarks.first_token M160-Q8_0.gguf M160-int8

A model is a GGUF file or a folder of `quire convert`. Each run is a fresh process. The reader imports what the server
needs and reads every byte once; the model answers a prompt of 16 tokens with one. Files are in the file cache.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

READ = """
import sys, torch, quire.engine.build
from pathlib import Path
for path in sys.argv[1:]:
    with Path(path).open("rb", buffering=0) as file:
        block = bytearray(16 << 20)
        while file.readinto(block):
            pass
"""
ANSWER = """
import sys
from quire import LLM, SamplingParams
llm = LLM(sys.argv[1], threads=1, max_num_seqs=2, max_model_len=256)
llm.generate({"prompt_token_ids": list(range(5, 21))}, SamplingParams(max_tokens=1), use_tqdm=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_token", description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for model in options.models:
        files = sorted(map(str, model.glob("*.safetensors"))) if model.is_dir() else [str(model)]
        cpu_seconds(READ, files)
        pairs = [(cpu_seconds(ANSWER, [str(model)]), cpu_seconds(READ, files)) for _ in range(options.rounds)]
        first, read = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(a / b for a, b in pairs)
        size = sum(Path(file).stat().st_size for file in files) / 1e6
        print(
            f"{model.name} ({size:.0f} MB): first token {first:.2f}, reading {read:.2f} CPU seconds, ratio "
            f"{ratio:.2f}; load average {os.getloadavg()[0]:.1f}",
            flush=True,
        )


def cpu_seconds(program: str, arguments: list[str]) -> float:
    """CPU seconds of a fresh Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
