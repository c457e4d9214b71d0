"""Records the scenes of the page's Learn view: `python scripts/write_page_scenes.py` writes page/scenes.json.

The real scheduler plans every step of a scene, with blocks of four tokens so that a reader can follow. The tokens are
the bundled model's. `record_scenes` needs no model: it replays the tokens that the file holds.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire import LLM, SamplingParams
from quire.engine.tokenizer import Tokenizer
from quire.kv_cache.block_pool import BlockPool
from quire.request import Request
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.step import StepPlan, StepResult

PACKAGE = Path(__file__).parents[1] / "src" / "quire"
FILE = PACKAGE / "server" / "page" / "scenes.json"
BLOCK_SIZE = 4
LIGHT = "ROMEO: But soft, what light"
Tokens = dict[str, list[list[int]]]
"""Prompt → the output tokens of each sample."""


@dataclass(frozen=True)
class Arrival:
    """A request of a scene: the step before which it comes, its prompt, its samples and tokens."""

    step: int
    name: str
    prompt: str
    n: int = 1
    max_tokens: int = 6


@dataclass(frozen=True)
class Scene:
    """One lesson."""

    title: str
    num_blocks: int
    arrivals: tuple[Arrival, ...]


SCENES = (
    Scene("Tokens fill blocks", 6, (Arrival(0, "A", LIGHT, max_tokens=7),)),
    Scene(
        "A second prompt shares them",
        8,
        (Arrival(0, "A", LIGHT, max_tokens=6), Arrival(3, "B", f"{LIGHT} through yonder window", max_tokens=4)),
    ),
    Scene("A sample writes and copies", 8, (Arrival(0, "A", LIGHT, n=2, max_tokens=5),)),
    Scene(
        "Memory runs out",
        7,
        (Arrival(0, "A", LIGHT, max_tokens=9), Arrival(0, "B", "JULIET: O Romeo, Romeo", max_tokens=9)),
    ),
)


@dataclass
class Recorder:
    """Plays one scene and notes what the pool holds after each step."""

    scene: Scene
    tokenizer: Tokenizer
    tokens: Tokens
    frames: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.scene.num_blocks, BLOCK_SIZE)
        limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=32, max_model_len=64)
        self.scheduler = Scheduler(self.pool, limits, clock=lambda: float(len(self.frames)))
        self.prompts: dict[str, str] = {}
        self.known: dict[int, list[int]] = {}
        """The tokens that each block held last."""

    def play(self) -> list[dict[str, Any]]:
        """All frames, from the arrival of the first request to the end of the last."""
        step = 0
        while step <= max(arrival.step for arrival in self.scene.arrivals) or self.scheduler.has_work:
            for arrival in self.scene.arrivals:
                if arrival.step == step:
                    self._add(arrival)
            self._step()
            step += 1
        return self.frames

    def _add(self, arrival: Arrival) -> None:
        self.prompts[arrival.name] = arrival.prompt
        self.scheduler.add(
            Request(
                request_id=arrival.name,
                prompt_token_ids=self.tokenizer.encode(arrival.prompt, add_special_tokens=False),
                params=SamplingParams(n=arrival.n, max_tokens=arrival.max_tokens),
                max_tokens=arrival.max_tokens,
            )
        )

    def _step(self) -> None:
        groups = {name: (group.num_preemptions, group.num_cached_tokens) for name, group in self._groups()}
        plan = self.scheduler.schedule()
        names = [self._name(row) for row in plan.rows]
        facts = self._facts(plan, groups)
        result = StepResult()
        for index, row in zip(plan.sample_indices, plan.sample_rows, strict=True):
            sequence = self.scheduler._queues.rows[row]
            assert sequence is not None
            prompt = self.prompts[sequence.group.request.request_id]
            output = (
                plan.num_computed_tokens[index] + plan.num_scheduled_tokens[index] - sequence.group.num_prompt_tokens
            )
            result.token_ids.append(self.tokens[prompt][sequence.index][output])
            result.logprobs.append(None)
            result.errors.append(None)
        copies = [list(pair) for pair in plan.block_copies]
        computed = dict(zip(names, plan.num_scheduled_tokens, strict=True))
        before = {name for name, _ in self._groups()}
        self.scheduler.update(plan, result)
        facts["ended"] = sorted(before - {name for name, _ in self._groups()})
        facts["computed"] = computed
        facts["taken"] = sorted({block for *_, blocks in plan.new_blocks for block in blocks})
        self._note(copies, facts)

    def _groups(self) -> list[tuple[str, Any]]:
        return list(self.scheduler.groups.items())

    def _name(self, row: int) -> str:
        sequence = self.scheduler._queues.rows[row]
        assert sequence is not None
        several = sequence.group.request.params.n > 1
        return sequence.group.request.request_id + (f".{sequence.index + 1}" if several else "")

    def _facts(self, plan: StepPlan, before: dict[str, tuple[int, int]]) -> dict[str, Any]:
        """What the step does besides computing."""
        started = {new.row for new in plan.new_rows}
        after = dict(self._groups())
        return {
            "preempted": [name for name, (count, _) in before.items() if after[name].num_preemptions > count],
            "started": [self._name(row) for row in plan.rows if row in started],
            "resumed": [
                self._name(row) for row in plan.rows if row in started and after[self._name(row)[0]].num_preemptions > 0
            ],
            "found": {
                self._name(row): plan.num_computed_tokens[at]
                for at, row in enumerate(plan.rows)
                if row in started and plan.num_computed_tokens[at]
            },
        }

    def _note(self, copies: list[list[int]], facts: dict[str, Any]) -> None:
        self.scheduler.update_fill()
        holders: dict[int, list[str]] = {}
        sequences = []
        for name, group in self._groups():
            for sequence in group.sequences:
                several = group.request.params.n > 1
                label = name + (f".{sequence.index + 1}" if several else "")
                state = "waiting" if sequence.row < 0 else "running"
                if sequence.row < 0 and group.num_preemptions:
                    state = "preempted"
                table = list(sequence.table.blocks)
                text = [self.tokenizer.id_to_text(token) for token in sequence.token_ids]
                sequences.append({"name": label, "state": state, "table": table, "text": "".join(text)})
                for position, block in enumerate(table):
                    holders.setdefault(block, []).append(label)
                    start = position * BLOCK_SIZE
                    stored = sequence.token_ids[start : min(start + BLOCK_SIZE, sequence.num_computed_tokens)]
                    self.known[block] = max(stored, self.known.get(block, []) if block in copies else [], key=len)
        blocks = []
        for block in range(self.pool.num_blocks):
            findable = self.pool.hashes[block] is not None or block in self.pool.children
            kind = "used" if holders.get(block) else "cached" if findable else "free"
            tokens = [] if kind == "free" else self.known.get(block, [])
            texts = [self.tokenizer.id_to_text(token) for token in tokens]
            blocks.append({"kind": kind, "holders": holders.get(block, []), "tokens": texts})
        frame = {"blocks": blocks, "sequences": sequences, "copies": copies, "facts": facts}
        frame["words"] = words(frame)
        self.frames.append(frame)


def words(frame: dict[str, Any]) -> list[str]:
    """Two sentences on a step: what happened, and why."""
    facts = frame["facts"]
    for happened, tell in _LESSONS:
        if happened(frame, facts):
            return tell(frame, facts)
    raise AssertionError("every step computes something")


def _names(names: list[str]) -> str:
    return " and ".join(names)


def _found(facts: dict[str, Any]) -> int:
    return sum(facts["found"].values())


def _computed(facts: dict[str, Any]) -> str:
    parts = [f"{count} token{'s' * (count > 1)} of {name}" for name, count in facts["computed"].items()]
    return ", ".join(parts)


Happened = Callable[[dict[str, Any], dict[str, Any]], bool]
Tell = Callable[[dict[str, Any], dict[str, Any]], list[str]]
_LESSONS: tuple[tuple[Happened, Tell], ...] = (
    (
        lambda frame, facts: bool(facts["preempted"]),
        lambda frame, facts: [
            f"No block is free, so {_names(facts['preempted'])}, which came last, gives back all its blocks and waits.",
            "Full blocks keep their hash until their space is needed, so what survives will be found again.",
        ],
    ),
    (
        lambda frame, facts: bool(facts["resumed"]),
        lambda frame, facts: [
            f"{_names(facts['resumed'])} comes back: {_found(facts)} of its tokens are still in the cache, "
            "and the step computes the rest.",
            "Prompt and output are one text by now, so the client notices a pause and nothing else.",
        ],
    ),
    (
        lambda frame, facts: bool(facts["found"]),
        lambda frame, facts: [
            f"{_names(list(facts['found']))} begins like a prompt whose blocks are stored: {_found(facts)} tokens are "
            "found by their hashes.",
            f"Its table points to the same blocks{_copied(frame)}, and the step computes only {_computed(facts)}.",
        ],
    ),
    (
        lambda frame, facts: bool(frame["copies"]),
        lambda frame, facts: [
            f"{_copier(frame)} writes its next token into a block that others share, so the block is copied first: "
            f"{_pairs(frame)}.",
            "Full blocks stay shared; only the partly filled last block is ever copied.",
        ],
    ),
    (
        lambda frame, facts: bool(facts["started"]) and any(len(each["holders"]) > 1 for each in frame["blocks"]),
        lambda frame, facts: [
            f"The prompt is computed once ({_computed(facts)}), and then the samples part.",
            "Each has its own table; both point to the same blocks, the partly filled last one too.",
        ],
    ),
    (
        lambda frame, facts: bool(facts["started"]),
        lambda frame, facts: [
            f"The step computes {_computed(facts)} and writes their keys and values into blocks of {BLOCK_SIZE} slots.",
            "Blocks are taken when a token needs one; nothing is reserved for tokens that may never come.",
        ],
    ),
    (
        lambda frame, facts: bool(facts["ended"]),
        lambda frame, facts: [
            f"{_names(facts['ended'])} has its last token, and all its blocks are free in the same step.",
            "They keep their content and hashes, so the next prompt that begins alike will find them.",
        ],
    ),
    (
        lambda frame, facts: bool(facts["taken"]),
        lambda frame, facts: [
            f"The step computes {_computed(facts)}; the last block is full, so the token takes a new one.",
            "A full block gets a hash of its tokens and of all before them, by which others find it.",
        ],
    ),
    (
        lambda frame, facts: True,
        lambda frame, facts: [
            f"The step computes {_computed(facts)}: the token sampled last goes into a free slot of its block.",
            "From its hidden state the next token is sampled, which will be written in the next step.",
        ],
    ),
)


def _copied(frame: dict[str, Any]) -> str:
    if not frame["copies"]:
        return ""
    return f" (the partly used one is copied before it writes there: {_pairs(frame)})"


def _copier(frame: dict[str, Any]) -> str:
    copies = {copy for _, copy in frame["copies"]}
    return _names([each["name"] for each in frame["sequences"] if copies & set(each["table"])]) or "A sample"


def _pairs(frame: dict[str, Any]) -> str:
    return ", ".join(f"block {source} to block {copy}" for source, copy in frame["copies"])


def record_scenes(tokens: Tokens) -> dict[str, Any]:
    """The content of scenes.json, with these tokens."""
    tokenizer = Tokenizer.from_folder(PACKAGE / "bundled")
    scenes = [{"title": scene.title, "frames": Recorder(scene, tokenizer, tokens).play()} for scene in SCENES]
    return {"block_size": BLOCK_SIZE, "tokens": tokens, "scenes": scenes}


def sample_tokens() -> Tokens:
    """What the bundled model says after each prompt: one sample greedy, several by their seed."""
    llm = LLM(num_blocks=64, dtype="float32", threads=1)
    tokens: Tokens = {}
    for arrival in {arrival.prompt: arrival for scene in SCENES for arrival in scene.arrivals}.values():
        ids = llm.get_tokenizer().encode(arrival.prompt, add_special_tokens=False)
        params = SamplingParams(n=2, temperature=0.8, seed=7, max_tokens=12, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": ids}], params)
        tokens[arrival.prompt] = [list(sample.token_ids) for sample in output.outputs]
    return tokens


def main() -> None:
    """Write the file."""
    FILE.write_text(json.dumps(record_scenes(sample_tokens()), ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
