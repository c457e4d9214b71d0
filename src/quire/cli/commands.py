"""The table of subcommands. An error is one line on standard error and a status.

Status 0: done. 1: failed. 2: wrong options. 3: the model cannot be loaded. 130: interrupted.
"""

import sys
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError

from quire import __version__
from quire.cli.configuration import read_configuration
from quire.errors import CheckpointError, ConfigError, MemoryPlanError, QuireError, RequestError

_ABOUT = "Serve large language models: paged KV cache, continuous batching, an OpenAI-compatible server."
_BATCH_ABOUT = "Answer files of requests, in the form of OpenAI's Batch API."
_CLUSTER_ABOUT = "Serve a model on several machines."
_BENCH_ABOUT = "Measure throughput, latency, start-up, memory, or a running server."

COMMANDS = {
    "serve": "Serve a model through OpenAI's API.",
    "generate": "Continue a prompt on the terminal.",
    "chat": "Talk to a model on the terminal.",
    "ps": "List the requests that a running server computes, and the memory they hold.",
    "top": "Watch a running server: requests, blocks, tokens per second, cache hits, waste.",
    "pull": "Download a model from the hub or a package index, and check it.",
    "list": "List the models kept on this machine.",
    "show": "Show what a kept model is, without loading it.",
    "rm": "Remove kept models.",
    "plan": "Show how much memory a model needs, how many users fit and how fast it would be, without loading it.",
    "router": "Send requests to several servers, each to the one that holds most of its prompt.",
    "simulate": "Replay a trace of requests through the scheduler or the paper's baselines, on a modelled device.",
}
BENCHMARKS = {
    "throughput": "Tokens per second over a batch of prompts.",
    "latency": "Seconds for one batch from start to end.",
    "serve": "Time to first token and between tokens of a running server, under load.",
    "startup": "Seconds from the start of the process to the first token.",
    "memory": "Share of the allocated KV cache that holds tokens.",
}
CLUSTERS = {"serve": "Serve replicas of a model on Ray, behind a router that knows their blocks."}
BATCHES = {"run": "Answer the requests of a file without a server; go on after an interruption."}
"""Subcommand → its summary. The file and the function of a subcommand have its name."""


def make_app() -> App:
    """All subcommands. Each is imported when it runs or when its help is shown."""
    style: dict[str, Any] = {
        "version_flags": (),
        "help_flags": ("--help", "-h"),
        "result_action": "return_value",
    }
    app = App(name="quire", help=_ABOUT, **{**style, "version_flags": ("--version",)}, version=__version__)
    for name, about in COMMANDS.items():
        app.command(f"quire.cli.{name}:{name}", name=name, help=about)
    bench = App(name="bench", help=_BENCH_ABOUT, **style)
    for name, about in BENCHMARKS.items():
        bench.command(f"quire.cli.bench_{name}:{name}", name=name, help=about)
    app.command(bench)
    batch = App(name="batch", help=_BATCH_ABOUT, **style)
    for name, about in BATCHES.items():
        batch.command(f"quire.cli.batch_{name}:{name}", name=name, help=about)
    app.command(batch)
    cluster = App(name="cluster", help=_CLUSTER_ABOUT, **style)
    for name, about in CLUSTERS.items():
        cluster.command(f"quire.cli.cluster_{name}:cluster_{name}", name=name, help=about)
    app.command(cluster)
    return app


def run(arguments: Sequence[str]) -> int:
    """Run one subcommand and return its status."""
    try:
        app = make_app()
        read_configuration(app, arguments)
        status = app(list(arguments) or ["--help"], print_error=False, exit_on_error=False, help_on_error=False)
        return status if isinstance(status, int) else 0
    except SystemExit:
        return 0  # rich exits when the reader of a help text closes the pipe
    except KeyboardInterrupt:
        return 130
    except CycloptsError as error:
        return _fail(str(error), 2)
    except (ConfigError, RequestError) as error:
        return _fail(str(error), 2)
    except (CheckpointError, MemoryPlanError) as error:
        return _fail(str(error), 3)
    except QuireError as error:
        return _fail(str(error), 1)


def _fail(message: str, status: int) -> int:
    print(f"quire: {' '.join(message.split())}", file=sys.stderr)
    return status
