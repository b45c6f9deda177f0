"""Measure the package's structure from its imports, and draw it.

    python docs/architecture.py            print the numbers of docs/architecture.md
    python docs/architecture.py --draw     also write docs/architecture.svg

Needs the extra `dev` (import-linter brings grimp). The order of the floors is the one that import-linter holds (pyproject.toml).
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "smartfrz_ds"
BACKENDS = "Backend|FlatBackend|PlainBackend|Zero12Backend|Zero3Backend|Bf16Backend|Fp16Backend|TorchBackend|PipelineStage"


def floors() -> list[list[str]]:
    """The rooms of each floor, the highest floor first, as the `layers` contract of pyproject.toml lists them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers" and c.get("containers") == [PACKAGE])
    return [[room.strip(" ()") for room in re.split(r"[|:]", layer)] for layer in layers]


def arrows(graph: grimp.ImportGraph) -> dict[tuple[str, str], int]:
    """(importing room, imported room) -> the number of imports between their modules."""
    counted: dict[tuple[str, str], int] = defaultdict(int)
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            pair = (room_of(module), room_of(imported))
            if pair[0] and pair[1] and pair[0] != pair[1]:
                counted[pair] += 1
    return dict(counted)


def room_of(module: str) -> str:
    """The top-level part of the package that a module belongs to; empty for the package itself."""
    return module.split(".")[1] if module.count(".") else ""


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The strongly connected components with more than one member (Tarjan)."""
    following: dict[str, list[str]] = defaultdict(list)
    nodes = set()
    for a, b in edges:
        following[a].append(b)
        nodes |= {a, b}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for after in following[node]:
            if after not in index:
                visit(after)
                low[node] = min(low[node], low[after])
            elif after in stack:
                low[node] = min(low[node], index[after])
        if low[node] == index[node]:
            part = []
            while True:
                part.append(stack.pop())
                if part[-1] == node:
                    break
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(nodes):
        if node not in index:
            visit(node)
    return found


def depth(edges: Iterable[tuple[str, str]]) -> int:
    """The number of modules on the longest chain of imports."""
    following: dict[str, set[str]] = defaultdict(set)
    for a, b in edges:
        following[a].add(b)
    known: dict[str, int] = {}

    def below(node: str, path: tuple[str, ...] = ()) -> int:
        if node not in known:
            known[node] = 1 + max((below(x, (*path, node)) for x in following[node] if x not in path), default=0)
        return known[node]

    return max((below(node) for node in list(following)), default=0)


def numbers(graph: grimp.ImportGraph) -> dict[str, object]:
    """What docs/architecture.md tells of the structure."""
    edges = [(m, i) for m in graph.modules for i in graph.find_modules_directly_imported_by(m) if PACKAGE not in (m, i)]
    order = {room: floor for floor, rooms in enumerate(reversed(floors())) for room in rooms}
    upward = [(a, b) for a, b in arrows(graph) if a in order and b in order and order[a] < order[b]]
    files = [*(ROOT / PACKAGE).rglob("*.py")]
    longest = max(files, key=lambda f: len(f.read_text().splitlines()))
    launch = [f for f in (ROOT / "launch").rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    asked = sum(len(re.findall(rf"isinstance\([^()]*(?:\([^()]*\))?[^()]*\b(?:{BACKENDS})\b", f.read_text())) for f in files)
    return {
        "modules at the package's top level": len(list((ROOT / PACKAGE).glob("*.py"))),
        "modules": len(files),
        "rooms, floors": f"{len([r for rooms in floors() for r in rooms])}, {len(floors())}",
        "longest chain of imports": depth(edges),
        "import circles": len(circles(edges)),
        "imports that point up": len(upward),
        "isinstance on kinds of backends": asked,
        "longest file": f"{longest.relative_to(ROOT)}, {len(longest.read_text().splitlines())} lines",
        "lines in launch/": sum(len(f.read_text().splitlines()) for f in launch),
    }


def draw(counted: Mapping[tuple[str, str], int]) -> str:
    """The house as SVG: a row a floor, a box a room, a line for each pair of rooms with imports, thicker with their number."""
    wide, high, gap = 132, 34, 46
    rows = floors()
    width = max(len(rooms) for rooms in rows) * (wide + 24) + 40
    places = {}
    for floor, rooms in enumerate(rows):
        left = (width - len(rooms) * (wide + 24) + 24) / 2
        for i, room in enumerate(rooms):
            places[room] = (left + i * (wide + 24), 20 + floor * (high + gap))
    height = 40 + len(rows) * (high + gap) - gap
    lines = []
    for (a, b), count in sorted(counted.items()):
        if a in places and b in places:
            (x, y), (u, v), stroke = places[a], places[b], min(4, 0.6 + count / 6)
            ends = f'x1="{x + wide / 2:.0f}" y1="{y + high:.0f}" x2="{u + wide / 2:.0f}" y2="{v:.0f}"'
            lines.append(f'<line {ends} stroke-width="{stroke:.1f}"/>')
    boxes = [
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{wide}" height="{high}" rx="5"/>'
        f'<text x="{x + wide / 2:.0f}" y="{y + 22:.0f}">{escape(room)}</text>'
        for room, (x, y) in places.items()
    ]
    style = (
        "line{stroke:#7a8ca8;stroke-opacity:.55}rect{fill:#eef2f8;stroke:#41587a}text{font:14px sans-serif;text-anchor:middle;fill:#1c2a3f}"
    )
    body = "\n".join([*lines, *boxes])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><style>{style}</style>\n{body}\n</svg>\n'


def main() -> None:
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True)
    for name, value in numbers(graph).items():
        print(f"{name}: {value}")
    if "--draw" in sys.argv[1:]:
        (ROOT / "docs" / "architecture.svg").write_text(draw(arrows(graph)))


if __name__ == "__main__":
    main()
