"""`python scripts/write_clients_page.py`: writes docs/clients.md from the table of clients and their results.

A test holds the page to both. With `--measure FOLDER [NAME...]` it first runs the clients' programs, by default of all,
in environments that it makes in FOLDER, as `make test-clients` does.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.clients.environments import RealClient, make_environment, read_clients  # noqa: E402

PAGE = ROOT / "docs" / "clients.md"
RESULTS = ROOT / "tests" / "data" / "clients.json"
FEATURES = ("chat", "stream", "tools", "structured output", "embeddings", "completions", "responses")
"""The columns of the page; other features stand in the last."""

HEADING = """# Clients

Written by `python scripts/write_clients_page.py`; do not edit.

| Client | Base URL | Endpoint |
| --- | --- | --- |
| openai (Python, npm), LangChain, LiteLLM, LlamaIndex, Open WebUI, Continue, Cline | `http://HOST:8000/v1` | \
`/v1/chat/completions`, `/v1/completions`, `/v1/embeddings` |
| openai `responses`, openai-agents, Codex | `http://HOST:8000/v1` | `/v1/responses` |
| anthropic, Claude Code (`ANTHROPIC_BASE_URL`) | `http://HOST:8000` | `/v1/messages`, `/v1/messages/count_tokens` |
| ollama and programs that know Ollama (`OLLAMA_HOST`) | `http://HOST:8000` | `/api/chat`, `generate`, `embed`, \
`tags`, `show`, `ps`, `version` |
| llama.vscode and other editors | `http://HOST:8000` | `/infill`, or `suffix` of `/v1/completions` |
| lm_eval | `http://HOST:8000/v1/completions` | `/v1/completions` with `echo` and `logprobs` |

`/openapi.json` has every field.

- Keys go into `Authorization: Bearer` or `x-api-key`; [keys](keys.md) may have limits.
- `--responses-store FILE` keeps responses beyond a restart; other keys never see them.
- An unknown field is ignored; the header `x-quire-warning` names it and the nearest known one. A known field that
  cannot be served is a 400.
- Of several samples one can fail alone: its `finish_reason` is `error`, and `error` says why.
- A limit beyond the context is a 400 on OpenAI's endpoints, and means "as many as fit" on Anthropic's and Ollama's.
- Pages of this machine and desktop programs (`app://`, `vscode-…`) may call; `--allow-origins` adds others.
- Without API keys the Host header must be localhost, an address, `--host` or a name of `--allowed-hosts`: a web site
  whose name leads to your machine gets 403. With keys only a given list is checked.
- The model's name is that of its folder, without the path, or `--served-model-name`.
- Bodies may be compressed (gzip, deflate) or sent as `curl -d` does; a slash at the end of a path changes nothing.
- Tools on OpenAI's or Anthropic's servers, and their calls in a conversation, are left out; the header names them.
- An `item_reference` finds items of stored responses. An assistant's text at the end of `/v1/messages` is continued.

## What each client was seen to do

`make test-clients` runs each client's own documented program, in an environment of its own, against a stand-in that
answers what fits the question; lm_eval and schemathesis talk to the bundled model. The table of clients is
`tests/clients/clients.toml`. A dash means that the client has no such thing, or that a note below says why it is not
tried.

"""


def clients_page() -> str:
    """The page as it should be."""
    results: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())
    clients = read_clients()
    lines = [_row("client", "version", *FEATURES, "more"), _row(*["---"] * (len(FEATURES) + 3))]
    lines += [_client_row(client, results.get(name, {})) for name, client in clients.items()]
    notes = [
        f"- {client.title}, {feature}: {reason}.\n"
        for client in clients.values()
        for feature, reason in client.without.items()
    ]
    return HEADING + "".join(lines) + "\n" + "".join(notes)


def _client_row(client: RealClient, seen: dict[str, Any]) -> str:
    shown = {feature: "✓" if seen.get("results", {}).get(feature, "") is None else "✗" for feature in client.shows}
    if seen.get("pins") != client.pins:
        shown = dict.fromkeys(client.shows, "not run")
    more = [
        feature if mark == "✓" else f"{feature} {mark}" for feature, mark in shown.items() if feature not in FEATURES
    ]
    versions = ", ".join(pin.rpartition("@" if client.npm else "==")[2] for pin in client.pins)
    return _row(client.title, versions, *(shown.get(feature, "—") for feature in FEATURES), ", ".join(more))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def measure(folder: Path, names: list[str]) -> None:
    """Run the programs of the clients `names`, and keep what they show with the versions."""
    from tests.clients.running import run_program, running

    clients = read_clients()
    for kind in ("stand-in", "bundled"):
        wanted = [client for client in clients.values() if client.server == kind and client.name in (names or clients)]
        if not wanted:
            continue
        with running(kind) as url:
            for client in wanted:
                make_environment(client, folder / client.name)
                results = run_program(client, url, folder / client.name)
                short = {feature: error and error.strip().splitlines()[-1] for feature, error in results.items()}
                found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                found[client.name] = {"pins": client.pins, "results": short}
                print(client.title, short, flush=True)
                RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if "--measure" in sys.argv[1:]:
        folder, *names = sys.argv[sys.argv.index("--measure") + 1 :]
        measure(Path(folder).absolute(), names)
    PAGE.write_text(clients_page())
