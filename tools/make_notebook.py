"""Writes `examples/tutorial.ipynb` from `docs/tutorial.md`: its text, and a cell for each block of bash and Python.

    .venv/bin/python tools/make_notebook.py

Blocks of other languages stay text: they are commands for other machines.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, NOTEBOOK = ROOT / "docs" / "tutorial.md", ROOT / "examples" / "tutorial.ipynb"
# The notebook lies in examples/, and its commands run in the folder above.
FIRST_CELL = "import os\n\nos.chdir('..' if os.path.basename(os.getcwd()) == 'examples' else '.')"


def notebook(page: str) -> str:
    """The notebook of a page, as the JSON text of nbformat 4.5."""
    cells = [("code", FIRST_CELL)]
    for position, part in enumerate(re.split(r"^```(bash|python)\n(.*?)^```\n", page, flags=re.MULTILINE | re.DOTALL)):
        if position % 3 == 0 and part.strip():
            cells.append(("markdown", re.sub(r"\]\((?!http|#|\.\./)", "](../docs/", part).replace("](../examples/", "](").strip()))
        elif position % 3 == 1:
            language = part
        elif position % 3 == 2:
            cells.append(("code", f"%%bash\n{part}".strip() if language == "bash" else part.strip()))
    described = []
    for number, (kind, text) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        described.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": described, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    NOTEBOOK.write_text(notebook(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
