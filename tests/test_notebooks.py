"""The notebooks: valid files without outputs, whose cells run in order and come to the results they tell of.

Each runs in a process of its own, because a form registered in one must not be there in the next.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT = 300  # seconds; one takes 20 on a free core

RUN = """
import json, sys
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
names = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
json.dump({name: names[name] for name in sys.argv[3:]}, open(sys.argv[2], "w"))
"""


def run_notebook(name, results, *variables):
    """Runs a notebook in its own folder, as a notebook server would; the values of some of its variables."""
    command = [sys.executable, "-c", RUN, str(ROOT / "notebooks" / f"{name}.ipynb"), str(results), *variables]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "STEPS": "40"}
    done = subprocess.run(
        command, cwd=ROOT / "notebooks", env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(results.read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_holds_no_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.proof
def test_variants_depend_on_what_the_paper_says(tmp_path):
    results = run_notebook("variants", tmp_path / "results.json", "summary", "final")
    assert all(loss < 3.2 for loss in results["final"].values()), results["final"]  # log(256) = 5.5
    summary = results["summary"]
    assert len({facts["parameters"] for facts in summary.values()}) == 1  # 3 divides the hidden size: mlp is exact too
    depends = {
        name: [facts[on] for on in ("key alone", "input", "hidden states")]
        for name, facts in summary.items()
        if name != "mlp"
    }
    assert depends == {
        "standard": [False, True, True],
        "approximate": [False, True, True],
        "non_approximate": [True, True, True],
        "rnd_emb_qk": [False, False, True],
        "fixed_seq_qk": [False, False, True],
        "static_emb_qk": [False, True, False],
    }
    assert all(facts["rows sum to one"] for name, facts in summary.items() if name != "mlp")


@pytest.mark.proof
def test_a_new_form_trains_in_a_notebook(tmp_path):
    results = run_notebook("new_form", tmp_path / "results.json", "losses", "difference", "passed")
    losses = results["losses"]
    assert losses[0] > 5.3 and losses[-1] < 2.5, losses[::10]  # log(256) = 5.5
    assert results["difference"] == 2 * 4 and results["passed"]  # a scale for each head of each layer
