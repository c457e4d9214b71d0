"""lm_eval: a local task with the model that Quire brings, served by Quire and loaded by the hf backend."""

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OPENAI_API_KEY="none")

import lm_eval
from lm_eval.tasks import TaskManager
from show import BASE_URL, equal, show

MODEL = os.environ["QUIRE_TOKENIZER"]
HOME = Path(os.environ["HOME"])
LINES = (
    ("But soft, what light through yonder", (" window breaks", " castle sings", " xylophone"), 0),
    ("To be, or not to be, that is the", (" question", " banana", " king of the"), 0),
    ("Good morrow,", (" cousin", " télé", " 17 %"), 0),
    ("My lord, I will not", (" be so", " go the", " é"), 1),
    ("What, ho!", (" Who", " what", " Where is the king?"), 2),
    ("I am a", (" man", " gentleman", "n"), 0),
)
TASKS = {
    "choices": """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "continuations": """output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks() -> TaskManager:
    data = HOME / "lines.jsonl"
    rows = [{"context": context, "choices": choices, "answer": answer} for context, choices, answer in LINES]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (HOME / f"{name}.yaml").write_text(f'{head}doc_to_text: "{{{{context}}}}"\n{body}')
    return TaskManager(include_path=str(HOME), include_defaults=False)


def evaluate(model: str, options: str) -> dict[str, Any]:
    found: Any = lm_eval.simple_evaluate(
        model=model, model_args=options, tasks=list(TASKS), task_manager=write_tasks(), bootstrap_iters=0, device="cpu"
    )
    assert found is not None
    return dict(found)


def served() -> dict[str, Any]:
    with urllib.request.urlopen(f"{BASE_URL}/models") as reply:
        name = json.load(reply)["data"][0]["id"]
    address = f"base_url={BASE_URL}/completions,model={name}"
    return evaluate("local-completions", f"{address},tokenizer={MODEL},add_bos_token=True")


def same() -> None:
    ours, theirs = served(), evaluate("hf", f"pretrained={MODEL},dtype=float32,add_bos_token=True")
    for name in TASKS:
        numbers = [
            {key: value for key, value in side["results"][name].items() if "stderr" not in key}
            for side in (ours, theirs)
        ]
        equal(numbers[0], numbers[1])
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            for (given,), (expected,) in zip(mine["resps"], other["resps"], strict=True):
                same_answer(given, expected)


def same_answer(given: Any, expected: Any) -> None:
    """A text, or (log-likelihood, whether it is the greedy choice)."""
    if isinstance(expected, str):
        equal(given, expected)
        return
    assert abs(float(given[0]) - float(expected[0])) < 1e-3, (given, expected)
    equal(str(given[1]), str(expected[1]))


show(**{"the accuracy and log-likelihoods of its hf backend": same})
