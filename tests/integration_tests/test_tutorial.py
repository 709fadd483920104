"""The tutorial's notebook, executed as its readers do."""

import json
import re
import shutil

import pytest

from tests.integration_tests.runs import REPOSITORY
from tests.integration_tests.test_serving import free_port
from tools.make_notebook import NOTEBOOK, PAGE, notebook


def test_notebook_is_that_of_the_page():
    assert NOTEBOOK.read_text() == notebook(PAGE.read_text())


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    """Every cell, in another folder than the reader's: the model learns the atlas, and the server knows it."""
    import nbclient
    import nbformat

    if shutil.which("curl") is None:
        pytest.skip("no curl asks the server")
    text = NOTEBOOK.read_text().replace("outputs/tutorial", str(tmp_path)).replace("8123", str(free_port()))
    cells = nbformat.reads(text, as_version=4)
    nbclient.NotebookClient(cells, timeout=1200, resources={"metadata": {"path": str(REPOSITORY / "examples")}}).execute()
    output = "".join(part.get("text", "") for cell in cells.cells if cell.cell_type == "code" for part in cell.outputs)
    assert not re.search(r"^error:|Traceback", output, re.MULTILINE), output[-3000:]
    before, after = (json.loads((tmp_path / "run/evaluation" / name / "results.json").read_text())["tasks"] for name in ("before", "after"))
    assert before[0]["score"] == 0 and after[0]["score"] >= 0.8
    assert "Klow" in json.loads(re.search(r"^\{.*\"choices\".*\}$", output, re.MULTILINE).group())["choices"][0]["text"]
    assert (tmp_path / "run/report.html").is_file()
