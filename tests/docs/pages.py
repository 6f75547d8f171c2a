"""Runs the code of Markdown pages, all of a page as one program.

Not by a plugin (sybil, pytest-examples, pytest-markdown-docs): those that run pages by
themselves ask of their code no more than to end. Here tests state what a page's program
must have left, under what warnings, files and environment, and compose the idioms of
docs/models.md with its other sections. What is left for a plugin are these lines.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def blocks(text: str) -> list[str]:
    """Blocks of Python in a page or a part of one, in order."""
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run(code: str, /, **names: Any) -> dict[str, Any]:
    """What a program leaves, where it starts from these names."""
    exec(compile(code, "<page>", "exec"), names)
    return names


def run_page(page: str, /, **names: Any) -> dict[str, Any]:
    """What the code of a page in docs/ leaves."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return run("\n".join(blocks(text)), **names)
