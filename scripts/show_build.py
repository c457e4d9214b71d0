"""Runs `pip install --verbose …` and shows what it downloads and compiles: python scripts/show_build.py LOG COMMAND …

The whole output goes into the file LOG. Of a command that fails the last lines are shown, and the status is its own.
"""

import re
import subprocess
import sys
from collections import deque
from pathlib import Path

_LAST_LINES = 30
_STEP = re.compile(r"\[\d+/\d+\]")
_KERNELS = re.compile(r"quire_kernels_(\w+)")
_SOURCE = re.compile(r"csrc/[\w/]+\.cpp")


def progress(line: str) -> str | None:
    """What a line of pip's output says of the progress; None for all other lines."""
    words = line.split()
    if words[:1] == ["Downloading"] or line.startswith("Installing collected packages"):
        return f"{words[0].lower()} {' '.join(words[1:])[:100]}"
    step = _STEP.search(line)
    if step is None:
        return None
    kernels, source = _KERNELS.search(line), _SOURCE.search(line)
    if "Linking" in line:
        return f"{step[0]} linking"
    if kernels is not None:
        return f"{step[0]} compiling the kernels for {kernels[1]}"
    return f"{step[0]} compiling {'the bindings' if source is None else source[0]}"


def main(log: Path, command: list[str]) -> int:
    """Run the command. Returns its status."""
    recent: deque[str] = deque(maxlen=_LAST_LINES)
    with (
        log.open("w") as kept,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running,
    ):
        assert running.stdout is not None
        for line in running.stdout:
            kept.write(line)
            recent.append(line)
            if (shown := progress(line)) is not None:
                print(f"quire: {shown}", flush=True)
    if running.returncode:
        print("".join(recent), f"quire: this failed; the whole output is in {log}", sep="", file=sys.stderr)
    return running.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
