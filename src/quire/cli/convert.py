"""`quire convert`: quantise a model once, and keep the result."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from quire.cli.options import ModelArgument
from quire.engine.memory_sizes import show_bytes
from quire.option_values import expand_home


def convert(
    model: ModelArgument,
    *,
    to: Annotated[str, Parameter(show_default=False)],
    output: Annotated[Path | None, Parameter(name=("--output", "-o"), show_default=False)] = None,
    lora: Annotated[Path | None, Parameter(show_default=False)] = None,
    revision: Annotated[str | None, Parameter(show_default=False)] = None,
) -> None:
    """Quantise a model once, or change its format, and write the result where nothing is yet.

    int8, int4 and int4-fast make a folder of weights as Quire's kernels for the CPU read them: it is served by mapping
    it, and answers as the original does with that --quantization. bf16, fp16 and fp32 make a folder in the form of the
    Hugging Face hub, also of a GGUF, GPTQ or AWQ model. gguf:TYPE makes a file that llama.cpp reads too.

    Parameters
    ----------
    model
        A folder, a GGUF file, or a name as other commands take it.
    to
        int8, int4, int4-fast; bf16, fp16, fp32; or gguf:TYPE, where TYPE is F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or
        Q4_0.
    output
        The folder or file to write. By default the model's name and the target, in the working folder.
    lora
        Folder of a LoRA adapter to merge into the weights: a model that is served with this adapter alone then costs
        what the original does.
    revision
        A branch, a tag or a commit of a model on the hub.
    """
    from quire.convert.output import check_place
    from quire.convert.target import Target
    from quire.engine.checkpoint import find_model, model_name

    target = Target.parse(to)
    source = find_model(model, revision)
    if output is not None:
        check_place(expand_home(output))  # before torch is imported
    from quire.convert.run import convert_model, default_output

    place = expand_home(output or default_output(source, model_name(model), target))
    started = time.perf_counter()
    with _progress() as on_bytes:
        made = convert_model(source, target, place, on_bytes, adapter=lora)
    bits = 8 * made.num_bytes / made.parameters
    print(
        f"{made.path}: {show_bytes(made.num_bytes)}, {bits:.2f} bits a parameter with all that is beside the weights, "
        f"in {time.perf_counter() - started:.1f} s; run quire serve {made.path}"
    )


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """Says on standard error how much is made, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console

    with Console(stderr=True).status("reading") as status:
        yield lambda count: status.update(f"made {show_bytes(count)}")
