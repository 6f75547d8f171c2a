"""Checks that an sdist holds what git has, and that its tests can be collected there.

`make dist` runs it on what it has built.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(archive: Path) -> None:
    """Unpacks an sdist and compares it with the checkout; exits if it lacks a file."""
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    tracked = {name for name in listed.decode().split("\0") if (ROOT / name).is_file()}
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        (root,) = Path(folder).iterdir()
        found = {str(path.relative_to(root)) for path in root.rglob("*")}
        if missing := sorted(tracked - found):
            raise SystemExit(f"{archive.name} lacks {missing}; see pyproject.toml")
        # Tests read pages, notebooks and digests when they are collected. As a module
        # pytest imports the package from there.
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only"]
        output = subprocess.run(
            command, cwd=root, capture_output=True, text=True, check=False
        )
        last = output.stdout.strip().rpartition("\n")[2]
        if output.returncode:
            raise SystemExit(f"{output.stdout[-3000:]}\n{output.stderr[-3000:]}")
    print(f"{archive.name} holds {len(tracked)} files of git, and its tests: {last}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
