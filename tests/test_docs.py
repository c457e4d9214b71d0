"""Holds the pages to what the code does: links, flags, file names, length, the request of the architecture page."""

import re
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.step import StepPlan, StepResult
from scripts.write_clients_page import clients_page
from scripts.write_models_page import models_page

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/decisions/*.md")]
)
GENERATED = {ROOT / f"docs/{name}.md" for name in ("clients", "models", "paper", "published-flaws")}
MAX_WORDS = 21_200
"""Of README, CONTRIBUTING and docs without decisions, whose number grows; each of those has a limit of its own."""
MAX_DECISION_LINES = 15

_LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_FLAG = re.compile(r"(?<![\w-])--(?:no-)?([a-z][a-z0-9-]+)")
_SOURCE = re.compile(r"`((?:[a-z_]+/)+[a-z_0-9]+\.(?:py|h|cpp))`")
FOREIGN_FLAGS = {
    *("cpus", "cpunodebind", "membind", "interleave"),  # docker, numactl
    *("hypothesis-seed",),  # pytest
    *("pip-args", "extra-index-url", "torch-backend"),  # pipx, pip, uv
    *(
        "option",
        "repeats",
        "servers",
        "num-prompts",
        "output",
        "strict",
        "measure",
        "streams",
        "peers",
        "decisions",
        "hot",
    ),  # of scripts, mypy
}


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for groups in _LINK.findall(page.read_text()):
        target = groups[0] or groups[1]
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    roots = (ROOT, ROOT / "src/quire", ROOT / "tests", ROOT / "tests/kernels")
    for name in _SOURCE.findall(page.read_text()):
        assert any((root / name).exists() for root in roots), f"{page.name} names {name}"


def test_flags_that_pages_name_exist() -> None:
    source = "\n".join(path.read_text() for path in ROOT.glob("src/quire/**/*.py"))
    for page in PAGES:
        for flag in _FLAG.findall(page.read_text()):
            name = flag.replace("-", "_")
            assert flag in FOREIGN_FLAGS or re.search(rf"\b{name}\b|--{flag}\b", source), f"{page.name} names --{flag}"


def test_pages_stay_short() -> None:
    decisions = set((ROOT / "docs/decisions").glob("0*.md"))
    words = sum(len(page.read_text().split()) for page in set(PAGES) - GENERATED - decisions)
    assert words <= MAX_WORDS, f"README, CONTRIBUTING and docs have {words} words"
    for page in decisions:
        assert len(page.read_text().splitlines()) <= MAX_DECISION_LINES, page.name


def test_every_decision_is_listed() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text()
    assert all(page.name in index for page in (ROOT / "docs/decisions").glob("0*.md"))


def test_the_page_of_models_is_that_of_the_table() -> None:
    assert (ROOT / "docs/models.md").read_text() == models_page()


def test_the_page_of_clients_is_that_of_the_results() -> None:
    assert (ROOT / "docs/clients.md").read_text() == clients_page()


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)


def test_the_readme_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = python_blocks(ROOT / "README.md")
    exec(compile(program, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("ROMEO:") >= 2
    assert "blocks" in printed


def test_the_request_of_the_architecture_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers on the page are those of a run."""
    page = (ROOT / "docs/architecture.md").read_text()
    llm = LLM(num_blocks=64)
    text = "ROMEO: But soft, what light through yonder window breaks? It is the east, and Juliet is the sun."
    token_ids = llm.get_tokenizer().encode(text)[:38]
    llm.generate({"prompt_token_ids": token_ids[:36]}, SamplingParams(max_tokens=1, temperature=0.0))

    scheduler = llm._engine._core._scheduler
    plans: list[dict[str, Any]] = []
    results: list[list[int]] = []
    schedule, update = scheduler.schedule, scheduler.update
    names = (
        *("rows", "num_computed_tokens", "num_scheduled_tokens", "token_ids"),
        *("sample_indices", "sample_rows", "new_blocks", "block_copies"),
    )

    def record_plan() -> StepPlan:
        plan = schedule()
        plans.append({name: list(getattr(plan, name)) for name in names})
        return plan

    def record_result(plan: StepPlan, result: StepResult) -> Any:
        results.append(list(result.token_ids))
        return update(plan, result)

    monkeypatch.setattr(scheduler, "schedule", record_plan)
    monkeypatch.setattr(scheduler, "update", record_result)
    params = SamplingParams(max_tokens=20, n=2, temperature=0.8, seed=1)
    (output,) = llm.generate({"prompt_token_ids": token_ids}, params)

    assert output.num_cached_tokens == 36
    assert len(plans) == 20
    first, second, twelfth = plans[0], plans[1], plans[11]
    for name in names[:-1]:
        assert f"{name} {first[name]}" in page, name
    assert f"token_ids {results[0]}" in page
    assert f"rows {second['rows']}, num_computed_tokens {second['num_computed_tokens']}" in page
    assert f"block_copies {second['block_copies']}" in page
    assert f"new_blocks {twelfth['new_blocks']}" in page
    assert all(not plan["new_blocks"] and not plan["block_copies"] for plan in plans[2:11])
