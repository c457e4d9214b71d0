"""The recipes of docs/extending.md: their code blocks are executed, and what they add is used."""

import ast
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama import LlamaForCausalLM

from quire import LLM, SamplingParams
from quire.config import EngineConfig
from quire.engine.engine import Engine
from tests.checkpoints import make_checkpoint
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
TITLES = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
OPTIONS: dict[str, Any] = {"threads": 1, "num_blocks": 64, "disable_log_stats": True}
PROMPT = "First Citizen:\nBefore we proceed any further, hear me speak."


def blocks(title: str) -> list[tuple[str, str, str]]:
    """("file" or "in", module, code) of each Python block below a heading."""
    section = PAGE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found = []
    for code in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
        head = re.match(r"# (file|in): (\S+)\.py\n", code)
        assert head is not None, f"a block of {title!r} does not say where its code goes"
        found.append((head[1], "quire." + head[2].replace("/", "."), code))
    assert found
    return found


def constants_made_from(module: ModuleType, name: str) -> list[tuple[str, Any]]:
    """The module's constants whose definitions mention `name`, with their values now."""
    found = []
    for statement in ast.parse(inspect.getsource(module)).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value):
                pass
            case _:
                continue
        if target != name and any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(value)):
            found.append((target, eval(compile(ast.Expression(value), module.__name__, "eval"), vars(module))))
    return found


class Source:
    """The package as if the blocks of a recipe had been written into its files. `undo` takes them out."""

    def __init__(self) -> None:
        self._undo: list[Any] = []

    def add(self, title: str) -> list[ModuleType]:
        """The new modules of a recipe, with its rows in the tables."""
        new = []
        for kind, name, code in blocks(title):
            if kind == "file":
                new.append(self._create(name, code))
            else:
                self._change(importlib.import_module(name), code)
        return new

    def undo(self) -> None:
        for step in reversed(self._undo):
            step()

    def _create(self, name: str, code: str) -> ModuleType:
        assert name not in sys.modules
        package, _, last = name.rpartition(".")
        parent = importlib.import_module(package)
        module = sys.modules[name] = ModuleType(name)
        setattr(parent, last, module)
        self._undo += [lambda: sys.modules.pop(name), lambda: delattr(parent, last)]
        exec(compile(code, name, "exec"), vars(module))
        return module

    def _change(self, module: ModuleType, code: str) -> None:
        """Run code in a module. A name that it rebinds is rebound wherever it was imported, and so are constants made
        from it: what an import would do if the code stood in the file."""
        before = dict(vars(module))
        tables = {name: dict(value) for name, value in before.items() if name.isupper() and isinstance(value, dict)}
        exec(compile(code, module.__name__, "exec"), vars(module))
        for name, table in tables.items():
            self._undo.append(lambda value=before[name], table=table: (value.clear(), value.update(table)))
        for name in [name for name in vars(module) if before.get(name) is not vars(module)[name]]:
            if name in before:
                self._rebind(module, name, before[name])
            else:
                self._undo.append(lambda name=name: delattr(module, name))

    def _rebind(self, module: ModuleType, name: str, old: Any) -> None:
        new = vars(module)[name]
        users = [user for key, user in sys.modules.items() if key.split(".")[0] == "quire"]
        for user in [module, *(user for user in users if vars(user).get(name) is old)]:
            setattr(user, name, new)
            self._undo.append(lambda user=user: setattr(user, name, old))
            for derived, value in constants_made_from(user, name):
                before = vars(user)[derived]
                setattr(user, derived, value)
                self._rebind(user, derived, before)


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source()
    yield source
    source.undo()


def greedy(llm: LLM, **options: Any) -> list[int]:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, **options)
    return llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids


def make_parallel_checkpoint(folder: Path) -> Path:
    """A Llama checkpoint without the norms that a parallel residual does not have."""
    make_checkpoint(folder, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["ParallelLlamaForCausalLM"]}))
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "post_attention" not in k}, folder / "model.safetensors")
    return folder


def parallel_oracle(folder: Path) -> LlamaForCausalLM:
    """transformers' Llama with the residual made parallel."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def parallel(layer: Any) -> Any:
        def forward(hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
            normed = layer.input_layernorm(hidden_states)
            return hidden_states + layer.self_attn(hidden_states=normed, **options)[0] + layer.mlp(normed)

        return forward

    for layer in model.model.layers:
        layer.forward = parallel(layer)
    return model


def test_a_model_family(source: Source, tmp_path: Path) -> None:
    source.add("A model family")
    folder = make_parallel_checkpoint(tmp_path)
    prompts = [[7, 40, 99, 3, 12, 250, 31], [5, 9]]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    oracle = parallel_oracle(folder)
    chunked = {"max_num_batched_tokens": 4, "max_num_seqs": 2}
    for options in ({}, chunked):
        outputs = LLM(str(folder), **OPTIONS, **options).generate(prompts, params, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            with torch.inference_mode():
                found = oracle.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
            assert output.outputs[0].token_ids == found[0, len(prompt) :].tolist()


def test_a_backend(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    (exact,) = source.add("A backend")
    num_calls = 0
    attention = exact.paged_attention

    def counted(*arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return attention(*arguments)

    monkeypatch.setattr(exact, "paged_attention", counted)
    tokens = greedy(LLM(attention_backend="exact", **OPTIONS))
    assert num_calls > 0
    assert tokens == greedy(LLM(attention_backend="sdpa", **OPTIONS))


def test_a_scheduling_policy(source: Source) -> None:
    source.add("A scheduling policy")

    def finished(policy: str) -> list[str]:
        engine = Engine(EngineConfig(scheduling_policy=policy, max_num_seqs=1, **OPTIONS), report=lambda line: None)
        for name in ("first", "second", "third"):
            engine.add_request(name, PROMPT, SamplingParams(max_tokens=1))
        order: list[str] = []
        while engine.has_work:
            order += [output.request_id for output in engine.step() if output.finished]
        return order

    assert finished("newest") == ["third", "second", "first"]
    assert finished("fcfs") == ["first", "second", "third"]


def test_a_logits_processor(source: Source) -> None:
    (module,) = source.add("A logits processor")
    llm = LLM(logits_processors=[module.BanToken()], **OPTIONS)
    tokens = greedy(llm)
    assert tokens[0] not in greedy(llm, extra={"ban": str(tokens[0])})


def test_an_endpoint(source: Source) -> None:
    source.add("An endpoint")
    with RunningServer(ScriptedEngine()) as server:
        assert server.send("POST", "/v1/shout", {"prompt": "x"})[1] == {"text": ANSWER.upper()}
        _, stream = server.send("POST", "/v1/shout", {"prompt": "x", "stream": True})
        assert "".join(re.findall(r'"text":"(.*?)"}', stream)) == ANSWER.upper()
        assert "/v1/shout" in server.send("GET", "/openapi.json")[1]["paths"]


def test_nothing_stays() -> None:
    """The recipes change tables that other tests read."""
    from quire.backends import BACKENDS
    from quire.scheduler.policies import SCHEDULING_POLICIES
    from quire.server.app import ENDPOINTS

    source = Source()
    titles = [
        title for title in TITLES if "```python" in PAGE.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    ]
    assert len(titles) >= 4
    before = (dict(BACKENDS), dict(SCHEDULING_POLICIES), ENDPOINTS, set(sys.modules))
    for title in titles:
        source.add(title)
    source.undo()
    from quire.backends import BACKENDS as backends
    from quire.server.app import ENDPOINTS as endpoints

    assert (dict(backends), dict(SCHEDULING_POLICIES), endpoints, set(sys.modules)) == before
