"""The code blocks of README.md and docs/, for the tests that run them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One code block.

    Attributes:
        page: its path from the repository's root.
        line: of its first line of code, counted from 1.
        language: what follows the backticks; empty where nothing does.
        not_run: the reason in `<!-- not run: … -->` in front of the block; empty where there is none.
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str

    def run(self, namespace: dict[str, Any]) -> None:
        """Execute the block; a traceback shows the page and the line in it."""
        exec(compile("\n" * (self.line - 1) + self.text, self.page, "exec"), namespace)


def blocks(language: str | None = None, page: str | None = None) -> list[Block]:
    """The blocks of all pages, or of one page, in order; of all languages, or of one."""
    found = []
    for path in PAGES:
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        for match in BLOCK.finditer(text):
            line = text[: match.start("text")].count("\n") + 1
            found.append(Block(name, line, match["language"], match["text"], match["why"] or ""))
    return [b for b in found if language in (None, b.language) and page in (None, b.page)]
