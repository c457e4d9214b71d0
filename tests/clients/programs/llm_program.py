"""llm, the command: models of extra-openai-models.yaml, as its page on other models says."""

import json
import os
import subprocess
import sys
from pathlib import Path

from show import ANSWER, BASE_URL, MODEL, QUESTION, REPORT, equal, show

folder = Path(os.environ["HOME"]) / "llm"
folder.mkdir()
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: quire\n  model_name: {MODEL}\n  api_base: {BASE_URL}\n"
    "  supports_tools: true\n  supports_schema: true\n"
)
TOOL = '''
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return "21 degrees"
'''


def llm(*arguments: str) -> str:
    environment = {**os.environ, "LLM_USER_PATH": str(folder), "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [sys.executable, "-m", "llm", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def chat() -> None:
    equal(llm("-m", "quire", "--no-stream", "Hello"), ANSWER)


def stream() -> None:
    equal(llm("-m", "quire", "Hello"), ANSWER)


def tools() -> None:
    equal(llm("-m", "quire", "--functions", TOOL, QUESTION), REPORT)


def structured_output() -> None:
    equal(json.loads(llm("-m", "quire", "--schema", "name, age int", "Hello")), {"name": "Ada", "age": 36})


show(chat=chat, stream=stream, tools=tools, structured_output=structured_output)
