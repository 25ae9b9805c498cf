"""Run the notebooks of this folder and store them with their outputs.

    python examples/execute.py

Outputs are stored because readers of the repository see them without running anything. Paths of this machine are left
out. A test runs the notebooks too, and stores nothing.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
CELL_TIMEOUT_S = 300


def notebooks() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def execute(file: Path, folder: Path) -> NotebookNode:
    """Run a notebook in `folder`. Raises CellExecutionError if a cell fails."""
    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=CELL_TIMEOUT_S, resources=resources, coalesce_streams=True)
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})  # two threads wait for each other on a busy machine
    return notebook


def text_of(notebook: NotebookNode) -> str:
    """All that the cells printed."""
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))


def for_readers(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The notebook without times, warnings (standard error), repeated lines, and paths above `folder`."""
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "text" in output:
                    output.text = re.sub(r"(?m)^(.*\n)\1+", r"\1", output.text.replace(f"{folder}/", ""))
    return notebook


def main() -> int:
    for file in notebooks():
        with tempfile.TemporaryDirectory() as folder:
            notebook = for_readers(execute(file, Path(folder)), Path(folder))
        nbformat.write(notebook, file)
        print(f"{file.stat().st_size / 1000:.0f} KB in {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
