"""guidellm: its README's benchmark, a few chats with synthetic data."""

import json
import os
import subprocess
import sys
from pathlib import Path

from show import MODEL, SERVER, show

HOME = Path(os.environ["HOME"])


def benchmark() -> None:
    options = {
        "backend": f"kind=openai_http,target={SERVER},model={MODEL}",
        "profile": "kind=synchronous",
        "constraint": "kind=max_requests,count=3",
        "data": f"kind=json_file,path={prompts()}",
        "tokenizer": f"kind=hf_auto,model={os.environ['QUIRE_TOKENIZER']}",
        "output": f"kind=json,path={HOME / 'benchmarks.json'}",
    }
    command = [str(Path(sys.executable).with_name("guidellm")), "run"]
    for name, value in options.items():
        command += [f"--{name}", value]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    report = json.loads((HOME / "benchmarks.json").read_text())
    totals = report["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["successful"] >= 3, totals
    assert totals["errored"] == 0, totals


def prompts() -> Path:
    path = HOME / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Hello {i}"}) + "\n" for i in range(5)))
    return path


show(benchmark=benchmark)
