"""The command line from outside: speed of --help and --version, errors in one line, statuses, closed pipes."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from quire import __version__
from quire.cli import commands
from quire.cli.commands import BATCHES, BENCHMARKS, COMMANDS, EXAMPLES, GROUPS, make_app, run


def quire(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "quire", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def cpu_seconds(*arguments: str) -> float:
    """CPU time, the minimum of three runs, so that other processes do not fail the test."""

    def once() -> float:
        before = os.times()
        assert quire(*arguments).returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    return min(once() for _ in range(3))


def test_version_answers_at_once() -> None:
    assert quire("--version").stdout.strip() == __version__
    assert cpu_seconds("--version") < 0.15


def test_help_is_quick_and_lists_everything() -> None:
    assert cpu_seconds("--help") < 0.5
    listed = quire("--help").stdout
    assert all(name in listed for name in [*COMMANDS, "bench"])


@pytest.mark.parametrize(
    "command",
    [
        *([name] for name in COMMANDS),
        *(["bench", name] for name in BENCHMARKS),
        *(["batch", name] for name in BATCHES),
    ],
)
def test_every_subcommand_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: quire {' '.join(command)}")
    assert "╭" in shown


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (["generate"], ["--max-tokens", "--top-k", "--stop", "--seed", "--ignore-eos", "--block-size"]),
        (["chat"], ["--url", "--system", "--max-tokens", "--seed", "--block-size"]),
        (
            ["bench", "serve"],
            ["--base-url", "--dataset", "--input-len", "--request-rate", "--percentiles", "--api-key"],
        ),
        (["bench", "memory"], ["--dataset", "--range-ratio", "--beam-width", "--block-size"]),
        (["bench", "throughput"], ["--dataset", "--output-len", "--output-json", "--seed"]),
    ],
)
def test_help_shows_every_flag(command: list[str], flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run([*command, "--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in flags)


def test_engine_and_server_flags_have_vllms_names(capsys: pytest.CaptureFixture[str]) -> None:
    run(["serve", "--help"])
    shown = capsys.readouterr().out
    for flag in (
        *(
            "--max-model-len",
            "--max-num-seqs",
            "--max-num-batched-tokens",
            "--block-size",
            "--dtype",
            "--kv-cache-memory",
        ),
        *(
            "--num-gpu-blocks-override",
            "--served-model-name",
            "--host",
            "--port",
            "--api-key",
            "--no-enable-prefix-caching",
        ),
        *("--tokenizer", "--revision", "--seed", "--max-logprobs", "--generation-config", "--load-format"),
    ):
        assert flag in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--max-modl-len", "4"], "Unknown option: --max-modl-len. Did you mean --max-model-len?"),
        (["srve"], 'Unknown command "srve". Did you mean "serve"?'),
        (["serve", "--block-size", "many"], '--block-size: unable to convert "many" into int'),
        (["serve", "--block-size", "0"], "block_size is 0; it must be an integer from 1 to 1024"),
        (
            ["serve", "--kv-cache-memory", "lots"],
            "kv_cache_memory is 'lots'; give a positive number of bytes",
        ),
        (["serve", "--dtype", "int3"], "dtype is 'int3'; it must be one of auto"),
        (["serve", "--host", "0.0.0.0"], "there is no API key; set --api-key or QUIRE_API_KEY"),
        (["serve", "--max-body-size", "x"], "max_body_size is 'x'"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1.0; it must be at least 0"),
        (["chat", "--top-p", "3"], "top_p is 3.0"),
        (["bench", "serve", "--dataset", "c4"], "dataset is 'c4'; it must be one of random"),
        (["bench", "serve", "--request-rate", "0"], "request_rate is 0.0; it must be more than 0"),
        *(
            ([*command, "--disk-cache", "/proc/quire"], "disk_cache is '/proc/quire', which cannot be used")
            for command in (["serve"], ["generate", "x"], ["chat"], ["bench", "latency"])
        ),
        (["serve", "--weights-cache", "/proc/quire"], "weights_cache is '/proc/quire', which cannot be used"),
        (["serve", "--max-num-seqs", "2.5"], "--max-num-seqs is 2.5; it must be a whole number"),
        (["plan", "--users", "2.5"], "--users is 2.5; it must be a whole number"),
        (["serve", "--served-model-name", ""], "served_model_name has an empty text; give a name"),
        (["serve", "--served-model-name", "a", "--served-model-name", " "], "served_model_name has an empty text"),
        (["show"], "quire show needs MODEL; see quire show --help"),
        (["rm"], "quire rm needs MODEL; see"),
        (["batch", "run", "x"], "quire batch run needs OUTPUT-FILE; see quire batch run --help"),
        (["convert", "x"], "--to needs a value; see quire convert --help"),
        (["serve", "--port"], "--port needs a value; see quire serve --help"),
        (["serve", "a", "b c"], "unexpected argument 'b c'; see --help"),
        (["bench", "latency", "--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["bench", "latency", "--num-iters", "0"], "num_iters is 0; it must be at least 1"),
        (["bench", "latency", "--num-iters-warmup", "-1"], "num_iters_warmup is -1; it must be at least 0"),
        (["bench", "startup", "--num-iters", "0"], "num_iters is 0; it must be at least 1"),
        (["bench", "throughput", "--dataset", "c4"], "dataset is 'c4'; it must be one of random"),
        (["bench", "serve", "--num-prompts", "0"], "num_prompts is 0; it must be at least 1"),
        (["bench", "serve", "--range-ratio", "2"], "range_ratio is 2.0; it must be from 0 to 1"),
        (["bench", "serve", "--percentiles", "101"], "percentiles has 101; each must be from 0 to 100"),
        *(
            ([*command, "/no/folder/x"], "There is no folder /no/folder")
            for command in (["bench", "latency", "--output-json"], ["simulate", "--json"], ["plan", "--measure"])
        ),
        *(
            (["ps", "--url", url], f"url is {url!r}; give one such as")
            for url in ("x", "http://[::1", "http://a:99999", "http://a:b", "http://a b", "ftp://a")
        ),
        (["chat", "--url", "http://a:b"], "url is 'http://a:b'"),
        (["router", "--backends", "http://a:b"], "backends has 'http://a:b', which is no URL"),
        (["bench", "nothing"], 'Unknown command "nothing"'),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("quire: ")
    assert shown.err.count("\n") == 1
    assert said in shown.err


def test_help_is_grouped_and_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--help"])
    shown = capsys.readouterr().out
    assert all(str(group.name) in shown for group in GROUPS)
    assert "Examples:\n  quire run smollm2\n" in shown


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_are_commands(line: str) -> None:
    """Each is read to its end: no command, flag or value in it is unknown."""
    words = shlex.split(line.partition(" | ")[0].partition(" > ")[0].partition(" < ")[0])
    if words[0] != "echo":
        make_app().parse_args(words, print_error=False, exit_on_error=False)


def test_completion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three commands, because all of them take their time."""
    kept = {
        group: {name: about for name, about in some.items() if name in ("ps", "rm", "completion")}
        for group, some in GROUPS.items()
    }
    monkeypatch.setattr(commands, "GROUPS", kept)
    for table in ("BENCHMARKS", "BATCHES", "CLUSTERS"):
        monkeypatch.setattr(commands, table, {})
    for shell in ("bash", "zsh", "fish"):
        assert run(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert "--url" in script.replace("-l 'url'", "--url").replace("-l url", "--url"), shell
        assert "List the requests" in script or shell == "bash"
        if shell == "zsh":
            assert "]:url:_files' " in script
            assert re.search(r"'1:[^:]+:_files' ", script)
            assert "_files:_files" not in script
        if shell == "bash" and shutil.which("bash"):
            assert completed(script, "quire ps --u") == ["--url"]
            assert completed(script, "quire completion ") == ["bash", "zsh", "fish"]
    assert run(["completion", "tcsh"]) == 2


def completed(script: str, line: str) -> list[str]:
    """What bash offers at the end of `line`. Where it offers nothing, it goes on to names of files."""
    *before, last = line.split(" ")
    words = shlex.join([*before, last])
    ask = f"COMP_WORDS=({words}); COMP_CWORD={len(before)}; _quire quire {last!r} {before[-1]!r}"
    shown = 'complete -p quire; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}\n{shown}"], capture_output=True, text=True, check=True)
    registered, *offered = done.stdout.splitlines()
    assert registered == "complete -o default -F _quire quire"
    return offered


def test_a_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "./no-such-model"]) == 3
    assert "./no-such-model is neither a folder nor a GGUF file" in capsys.readouterr().err
    assert run(["pull", ""]) == 3
    assert "quire: '' is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "starts"),
    [
        ("serve --help", "Usage"),
        ("plan --json", "{"),
        ("generate ROMEO: --max-tokens 64 --ignore-eos --threads 1 --num-blocks 64", ""),
    ],
)
def test_a_closed_pipe_is_no_error(arguments: str, starts: str) -> None:
    """The reader takes one byte and leaves, as head does: no traceback, and status 0."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "quire", *arguments.split()]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1).decode().startswith(starts[:1])
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(60) == 0
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
