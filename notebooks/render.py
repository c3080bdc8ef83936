"""Runs notebooks and keeps what they show: `make notebooks`, or `python notebooks/render.py new_form surgery`.

A notebook is written as NAME.py (jupytext, py:percent); NAME.ipynb is the same cells with their outputs, for code hosts
to show. Each runs in a kernel of its own, in its own folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NAMES = ("new_form", "look_inside", "layouts_and_costs", "surgery")


def execute(source: Path, seconds: int = 1800) -> nbformat.NotebookNode:
    """The notebook of NAME.py, run where that file lies, with its outputs. Raises CellExecutionError."""
    notebook = jupytext.read(source)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    # Without the times of each cell, which would be another difference at every rendering.
    client = NotebookClient(
        notebook, timeout=seconds, record_timing=False, resources={"metadata": {"path": str(source.parent)}}
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(names: list[str]) -> int:
    for name in names or NAMES:
        print(f"{name} ...", flush=True)
        nbformat.write(execute(FOLDER / f"{name}.py"), FOLDER / f"{name}.ipynb")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
