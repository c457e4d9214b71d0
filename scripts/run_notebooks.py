"""Run the notebooks of docs/notebooks and write what their cells print into them.

    python scripts/run_notebooks.py

Cells print; they show no pictures. A cell's output is what it prints, so every run gives the same file.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"


def run_notebook(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of its code cells, run in order in one namespace. Raises what a cell raises."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        number += 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)
        text = printed.getvalue().splitlines(keepends=True)
        cell["execution_count"] = number
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
    return notebook


def main() -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        path.write_text(json.dumps(run_notebook(path), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path.name} written")


if __name__ == "__main__":
    main()
