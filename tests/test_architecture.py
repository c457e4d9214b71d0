"""Holds the laws of docs/architecture.md by reading the syntax trees of src/quire, and a few by running it.

Nothing is imported to be checked, so a law holds for imports inside functions too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"

LEVELS = (
    {
        "errors",
        "structured_outputs",
        "sampling_params",
        "dtypes",
        "quantization",
        "gguf",
        "kv_groups",
        "layer_spec",
        "layer_stage",
        "memory_stats",
        "model_config",
        "backends",
        "config",
        "option_values",
        "kv_events_config",
        "kv_transfer_config",
        "speculative_config",
        "vllm_options",
        "vllm_rare_options",
        "inputs",
        "image_input",
        "request",
        "step",
        "outputs",
        "pool_view",
        "embeddings",
        "generation_progress",
    },
    {"kernels", "grammar", "images"},
    {"attention"},
    {"layers"},
    {"kv_cache", "models", "sampling", "lora"},
    {"scheduler", "runner", "routing", "kv_events", "parallel"},
    {"engine", "simulation"},
    {"llm", "llm_vectors", "server", "router", "cluster", "convert", "cli"},
    {"__main__"},
)
"""From the vocabulary up. A room imports rooms below, and its neighbours as long as they do not import it."""

STRANGERS = [
    *(("scheduler", "runner"), ("runner", "scheduler")),
    *(("engine", "simulation"), ("simulation", "engine"), ("simulation", "runner")),
]
"""The scheduler and who executes meet in step.py, whether a runner does or a simulation."""

WITHOUT_TORCH = {
    "scheduler",
    "kv_cache",
    "grammar",
    "images",
    "simulation",
    "routing",
    "kv_events",
    "parallel",
    "server",
    "router",
    "cluster",
    "cli",
    "llm",
    *LEVELS[0],
}
"""Rooms that load no torch, neither themselves nor through what they import when they are imported."""

ENGINE_WITH_TORCH = {"build", "build_rank"}
"""The files of the engine that make a runner. The API process uses the other files, and loading begins in them before
torch is imported."""

TENSORS_OF_THE_CACHE = "quire.kv_cache.storage"

GPU_LIBRARIES = {"triton", "flashinfer"}
ROOMS_OF_THE_GPU = ("quire.kernels.triton",)

NEVER_IMPORTED = {"transformers", "pydantic", "pickle", "cloudpickle", "dill", "shelve", "marshal"}
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "base"}


@dataclass(frozen=True)
class Import:
    """One import statement: `target` in full, and whether it runs when the module is imported."""

    module: str
    line: int
    target: str
    eager: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its full name."""
    found = {}
    for path in python_files("src/quire"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), filename=str(path))
    return found


@cache
def lazy_names() -> dict[str, str]:
    """The table of quire/__init__.py: public name → module that defines it."""
    for node in modules()["quire"].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME_OF":
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    raise AssertionError("quire/__init__.py has no table _HOME_OF")


def room_of(module: str) -> str:
    """`quire.engine.metrics` → `engine`; the package itself has no room."""
    return module.split(".")[1] if "." in module else ""


def root_of(module: str) -> str:
    return module.partition(".")[0]


def level_of(module: str) -> int:
    for level, rooms in enumerate(LEVELS):
        if room_of(module) in rooms:
            return level
    raise AssertionError(f"{module} is in no room of LEVELS; say where it belongs")


def eager_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run on import: everything but the insides of functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from eager_nodes(node)


@cache
def imports() -> list[Import]:
    found = []
    for module, tree in modules().items():
        eager = set(map(id, eager_nodes(tree)))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found += [Import(module, node.lineno, target, id(node) in eager) for target in targets(module, node)]
    return found


def targets(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0, f"{module}:{node.lineno} has a relative import; write the full name"
    assert node.module is not None
    for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        if node.module == "quire":
            inner = lazy_names().get(alias.name, inner)
        yield inner if inner in modules() or is_compiled(inner) else node.module


def is_compiled(name: str) -> bool:
    """Whether `name` is an extension module; of those the tree holds the types."""
    return (SOURCE / name.replace(".", "/")).with_suffix(".pyi").exists()


def inside(imported: list[Import]) -> list[Import]:
    """The imports between rooms of the package."""
    return [each for each in imported if each.target.startswith("quire.")]


def test_every_module_has_a_level() -> None:
    for module in modules():
        if module != "quire":
            level_of(module)


def test_imports_only_go_down() -> None:
    upward = [
        str(each)
        for each in inside(imports())
        if each.module == "quire" or level_of(each.target) > level_of(each.module)
    ]
    assert upward == []


def test_scheduler_runner_and_simulation_meet_in_plain_values() -> None:
    met = [str(each) for each in inside(imports()) if (room_of(each.module), room_of(each.target)) in STRANGERS]
    assert met == []


@pytest.mark.parametrize("unit", ["module", "room"])
def test_no_import_cycles(unit: str) -> None:
    """Among modules, and among rooms: neighbours on one level depend on each other one way only."""
    graph: dict[str, set[str]] = {}
    for each in inside(imports()):
        source, target = each.module, each.target
        if unit == "room":
            source, target = room_of(source), room_of(target)
        if source != target:
            graph.setdefault(source, set()).add(target)
    assert find_cycle(graph) == []


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The first cycle met in a depth-first walk, or an empty list."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for following in sorted(graph.get(node, ())):
            if cycle := visit(following):
                return cycle
        done.add(path.pop())
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node))), [])


def test_find_cycle_finds_one() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_nothing_is_hidden_behind_type_checking() -> None:
    hidden = [
        f"{module}:{node.lineno}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id == "TYPE_CHECKING")
        or (isinstance(node, ast.Attribute) and node.attr == "TYPE_CHECKING")
    ]
    assert hidden == []


def is_free_of_torch(module: str) -> bool:
    """Whether the law asks it of this module."""
    if module == TENSORS_OF_THE_CACHE:
        return False
    room, _, file = module.removeprefix("quire.").partition(".")
    return room in WITHOUT_TORCH or (room == "engine" and file not in ENGINE_WITH_TORCH)


def test_rooms_without_torch_never_name_it() -> None:
    """Not inside functions either."""
    named = [str(each) for each in imports() if root_of(each.target) == "torch" and is_free_of_torch(each.module)]
    assert named == []


def test_rooms_without_torch_do_not_load_it_through_others() -> None:
    loads: dict[str, set[str]] = {}
    for each in imports():
        if each.eager:
            loads.setdefault(each.module, set()).add(each.target)
    found = [
        " ← ".join(reversed(chain))
        for module in modules()
        if is_free_of_torch(module)
        if (chain := chain_to_torch(module, loads))
    ]
    assert found == []


def chain_to_torch(start: str, loads: dict[str, set[str]]) -> list[str]:
    """The modules through which importing `start` loads torch, or an empty list."""
    came_from = {start: ""}
    queue = [start]
    for module in queue:
        parents = {module.rpartition(".")[0]} - {""}
        for target in sorted(loads.get(module, set()) | parents):
            if target not in came_from:
                came_from[target] = module
                queue.append(target)
            if root_of(target) == "torch":
                chain = [target]
                while chain[-1] != start:
                    chain.append(came_from[chain[-1]])
                return chain[::-1]
    return []


def test_what_is_never_imported() -> None:
    assert [str(each) for each in imports() if root_of(each.target) in NEVER_IMPORTED] == []


def test_gpu_libraries_are_imported_only_where_kernels_need_them() -> None:
    """And nothing imports those rooms when it is imported itself: `import quire` must work without them."""
    named = [each for each in imports() if root_of(each.target) in GPU_LIBRARIES]
    assert [str(each) for each in named if not each.module.startswith(ROOMS_OF_THE_GPU)] == []
    loaders = [each for each in inside(imports()) if each.target.startswith(ROOMS_OF_THE_GPU) and each.eager]
    assert [str(each) for each in loaders if not each.module.startswith(ROOMS_OF_THE_GPU)] == []


def test_no_code_is_made_from_data() -> None:
    """No eval, no exec, no unpickling: a checkpoint or a request is data and stays data."""
    found = []
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in {"eval", "exec", "compile", "__import__", "torch.load"}:
                found.append(f"{module}:{node.lineno} calls {called}")
    assert found == []


def test_no_private_operator_of_torch_is_called() -> None:
    """They change without notice: dense layers are Quire's own products, so there is none to guard at start."""
    found = [
        f"{module}:{node.lineno} names {ast.unparse(node)}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.ops", "torch._"))
    ]
    assert found == []


def test_names_say_what_a_file_owns() -> None:
    paths = [*python_files("src/quire", "benchmarks", "examples", "scripts"), *(ROOT / "csrc").rglob("*.*")]
    parts = {path: {path.stem, *path.relative_to(ROOT).parts} for path in paths}
    assert [str(path) for path in paths if parts[path] & NAMES_THAT_SAY_NOTHING] == []


def test_every_module_opens_with_a_docstring() -> None:
    paths = python_files("src/quire", "benchmarks", "examples", "scripts")
    assert [str(path) for path in paths if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_public_names_are_where_the_table_says() -> None:
    for name, module in lazy_names().items():
        defined = {node.name for node in modules()[module].body if isinstance(node, ast.ClassDef)}
        assert name in defined, f"{module} defines no class {name}"


def test_type_checkers_see_the_same_public_names() -> None:
    stub = ast.parse((SOURCE / "quire" / "__init__.pyi").read_text())
    seen = {alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == lazy_names()


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "part", ["quire.server", "quire.router", "quire.cli", "quire.llm", "quire.simulation", "quire.engine.async_engine"]
)
def test_the_api_process_stays_light(part: str) -> None:
    names = [module for module in modules() if module == part or module.startswith(f"{part}.")]
    program = f"import sys, {', '.join(names)}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = set(run_python(program).split())
    assert "quire" in loaded
    assert loaded & {"torch", "numpy", "transformers", "pydantic", "scipy"} == set()


def test_the_engine_process_knows_neither_text_nor_http() -> None:
    """Token ids go in and out of it. What they spell only a grammar must know, whose compiler, loaded with the model,
    reads the vocabulary for itself."""
    loaded = set(run_python("import sys, quire.engine.engine_process, quire.engine.build\nprint(*sys.modules)").split())
    assert "quire.runner.model_runner" in loaded
    text = {"tokenizer", "detokenizer", "chat_template", "input_processor", "output_processor", "async_engine"}
    assert loaded & {f"quire.engine.{module}" for module in text} == set()
    assert {name for name in loaded if name.startswith(("quire.server", "quire.cli", "quire.llm"))} == set()
    libraries = {
        "tokenizers",
        "jinja2",
        "starlette",
        "uvicorn",
        "uvloop",
        "httptools",
        "prometheus_client",
        "llguidance",
    }
    assert loaded & libraries == set()


def test_import_quire_costs_next_to_nothing() -> None:
    program = (
        "import time; t = time.perf_counter(); import quire; print(time.perf_counter() - t)\n"
        "import sys; assert 'torch' not in sys.modules and 'quire.errors' not in sys.modules"
    )
    assert min(float(run_python(program)) for _ in range(5)) < 0.050
