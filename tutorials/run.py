"""Runs the tutorials' notebooks: short, as a check, or whole, to keep their outputs.

    python tutorials/run.py --smoke                # all of them, fewer steps and draws
    python tutorials/run.py --save 5-arviz-workflow  # one, whole, outputs written back

With ``--smoke`` a notebook finds ``SMOKE_TEST`` in its environment; its claims are
asserted all the same. A notebook that fails, or takes longer than it may, is an error.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

FOLDER = Path(__file__).resolve().parent
# In the order to read them. A notebook that is not here is never run: a test compares.
NOTEBOOKS = (
    "1-quickstart",
    "2-in-between-uncertainty",
    "3-choosing-the-subnet",
    "4-pretrained-cnn",
    "5-arviz-workflow",
    "6-when-to-trust-it",
    "7-coming-from",
    "8-fine-tuned-transformer",
)
# Seconds of a notebook; an idle machine takes a fifth, a busy one should not fail.
SMOKE_LIMIT = 300
LIMIT = 900
# A kernel warns of its own, local connection. Pictures have two dots for one of a page.
KERNEL = ["--log-level=ERROR", "--InlineBackend.figure_formats=retina"]


class TutorialError(RuntimeError):
    """A notebook did not run to its end."""


def execute(path: Path, *, smoke: bool, limit: float) -> tuple[Any, float]:
    """Runs a notebook in a kernel of its own, in the notebook's folder.

    Args:
        path: Of the notebook.
        smoke: Whether it takes fewer steps and draws.
        limit: Of the whole run, in seconds.

    Returns:
        The notebook with its new outputs, and how long it took, in seconds.

    Raises:
        TutorialError: If a cell fails, or the time is over. The message ends with the
            cell and its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=limit,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=KERNEL,
        resources={"metadata": {"path": str(path.parent)}},
    )
    start = time.perf_counter()
    # tqdm warns of bars that it could draw, had it ipywidgets; no bar is wanted here.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"}
    environment.pop("SMOKE_TEST", None)
    if smoke:
        environment["SMOKE_TEST"] = "1"
    try:
        with client.setup_kernel(env=environment):
            for index, cell in enumerate(notebook.cells):
                client.timeout = max(1, round(limit - (time.perf_counter() - start)))
                client.execute_cell(cell, index)
    except CellTimeoutError as error:
        raise TutorialError(
            f"`{path.name}` must run within {limit:g} s; it did not. Take fewer steps "
            f"where SMOKE is set.\n{error}"
        ) from error
    except (CellExecutionError, DeadKernelError) as error:
        raise TutorialError(f"`{path.name}` must run to its end.\n{error}") from error
    return notebook, time.perf_counter() - start


def save(notebook: Any, path: Path) -> None:
    """Writes a notebook without what differs from machine to machine."""
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
    nbformat.write(notebook, path)


def run(name: str, options: argparse.Namespace) -> str | None:
    """Runs one notebook and says how long it took; returns what went wrong."""
    path = options.folder / f"{name}.ipynb"
    limit = SMOKE_LIMIT if options.smoke else LIMIT
    try:
        notebook, seconds = execute(path, smoke=options.smoke, limit=limit)
    except TutorialError as error:
        return str(error)
    if options.save:
        save(notebook, path)
    print(f"{name}: {seconds:.0f} s", flush=True)
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NOTEBOOKS, metavar="NAME")
    parser.add_argument("--smoke", action="store_true", help="fewer steps and draws")
    parser.add_argument("--save", action="store_true", help="write the outputs back")
    parser.add_argument("--workers", type=int, default=1, help="notebooks at a time")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the notebooks")
    options = parser.parse_args(arguments)
    if options.smoke and options.save:
        parser.error("--save keeps the outputs of a whole run; leave --smoke out")
    missing = [
        name
        for name in options.names
        if not (options.folder / f"{name}.ipynb").exists()
    ]
    if missing:
        parser.error(f"no such notebook: {', '.join(missing)}; one of {NOTEBOOKS}")
    with ThreadPoolExecutor(options.workers) as pool:
        failures = list(pool.map(lambda name: run(name, options), options.names))
    for failure in filter(None, failures):
        print(failure, file=sys.stderr)
    if any(failures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
