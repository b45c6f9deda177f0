"""Measure the package's structure from its imports, and draw it.

    python docs/architecture.py            print the numbers of docs/architecture.md
    python docs/architecture.py --draw     also write docs/architecture.svg
    python docs/architecture.py DIR        the numbers of another checkout of the repository

Needs grimp, which the extra `test` installs with import-linter. The order of the floors is read from the contracts of import-linter in
pyproject.toml, so the figure shows what the check enforces.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise, permutations, product
from pathlib import Path

import grimp
import tomllib

ROOT = next((Path(x).resolve() for x in sys.argv[1:] if not x.startswith("-")), Path(__file__).resolve().parent.parent)
PACKAGE = "smartfrz_ds"
BACKENDS = r"\w*Backend|PipelineStage"

# The figure's caption of each room, and the storeys of the house: a name, a room of its highest floor, a room of its lowest.
CAPTIONS = {
    "cli": "the smartfrz command",
    "bench": "measurements on real engines",
    "integrations": "DeepSpeed, torch, Hugging Face",
    "checkpoint": "save, resume, reshape",
    "runtime": "controller, freezer, policy stage",
    "telemetry": "what a person gets to see",
    "signals": "what a policy gets to see",
    "cache": "stored outputs of a frozen prefix",
    "backends": "deepspeed, pipeline, torch",
    "policies": "one file per policy",
    "predictor": "has a layer converged?",
    "distributed": "ranks that agree; lost contact",
    "model": "layers, without an engine",
    "config": "what the user sets",
    "planner": "arithmetic only",
    "errors": "what a run raises",
    "_version": "one string",
}
STOREYS = [
    ("doors", "cli", "integrations"),
    ("runtime", "checkpoint", "runtime"),
    ("senses, voice", "telemetry", "cache"),
    ("engines, judges", "backends", "backends"),
    ("ground", "predictor", "errors"),
]


def floors() -> list[list[str]]:
    """The rooms of each floor, the highest floor first, from the `layers` contract in pyproject.toml; empty without one."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"].get("importlinter", {}).get("contracts", [])
    layers: list[str] = next((c["layers"] for c in contracts if c["type"] == "layers" and c.get("containers") == [PACKAGE]), [])
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
    """The rows of the table in docs/architecture.md."""
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
        "rooms, floors": f"{len(order)}, {len(floors())}" if order else "not defined",
        "longest chain of imports": depth(edges),
        "import circles between modules": len(circles(edges)),
        "import circles between rooms": len(circles(arrows(graph))),
        "imports that point up": len(upward) if order else "not defined",
        "isinstance on kinds of backends": asked,
        "longest file": f"{longest.relative_to(ROOT)}, {len(longest.read_text().splitlines())} lines",
        "lines in launch/": sum(len(f.read_text().splitlines()) for f in launch),
    }


def direct(edges: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges of an acyclic graph that no longer path implies (its transitive reduction)."""
    following: dict[str, set[str]] = defaultdict(set)
    for a, b in edges:
        following[a].add(b)

    def reachable(node: str) -> set[str]:
        return {x for after in following[node] for x in {after} | reachable(after)}

    return sorted((a, b) for a, after in list(following.items()) for b in after if not any(b in reachable(x) for x in after - {b}))


def arranged(rows: list[list[str]], edges: Collection[tuple[str, str]]) -> list[list[str]]:
    """The rooms of each floor in the order in which the edges are shortest sideways."""

    def sideways(rows: Sequence[Sequence[str]]) -> float:
        place = {room: i - (len(rooms) - 1) / 2 for rooms in rows for i, room in enumerate(rooms)}
        return sum(abs(place[a] - place[b]) for a, b in edges)

    return [list(rooms) for rooms in min(product(*(permutations(rooms) for rooms in rows)), key=sideways)]


def draw(counted: Mapping[tuple[str, str], int]) -> str:
    """The house as SVG: a row per floor, a box per room, an arrow per pair of rooms with imports that no chain of other arrows implies."""
    wide, high, gap, between, margin = 210, 52, 34, 40, 150
    order = {room: floor for floor, rooms in enumerate(floors()) for room in rooms}
    drawn = direct(edge for edge in counted if edge[0] in order and edge[1] in order)
    rows = arranged(floors(), drawn)
    width = margin + max(len(rooms) for rooms in rows) * (wide + between) + 40
    middle = margin + (width - margin) / 2
    left, top = {}, {}
    for floor, rooms in enumerate(rows):
        start = middle - (len(rooms) * (wide + between) - between) / 2
        for i, room in enumerate(rooms):
            left[room], top[room] = start + i * (wide + between), 20 + floor * (high + gap)
    height = 20 + len(rows) * (high + gap)

    def way(a: str, b: str, x0: float, x1: float) -> str:
        """A path down from room a to room b that passes the floors between them beside their boxes."""
        points = [(x0, top[a] + high)]
        for floor in range(order[a] + 1, order[b]):
            boxes = [left[room] for room in rows[floor]]
            lanes = [boxes[0] - 22, *(x + wide + between / 2 for x in boxes[:-1]), boxes[-1] + wide + 22]
            y = 20 + floor * (high + gap)
            lane = min(lanes, key=lambda x: abs(x - points[-1][0]) + abs(x - x1))
            points += [(lane, y), (lane, y + high)]
        points.append((x1, top[b] - 3))
        path = f"M{points[0][0]:.0f},{points[0][1]:.0f}"
        for (x, y), (u, v) in pairwise(points):
            path += f" C{x:.0f},{(y + v) / 2:.0f} {u:.0f},{(y + v) / 2:.0f} {u:.0f},{v:.0f}" if x != u else f" L{u:.0f},{v:.0f}"
        return path

    lines = []
    for a, b in drawn:
        out = sorted((y for x, y in drawn if x == a), key=lambda room: left[room])
        into = sorted((x for x, y in drawn if y == b), key=lambda room: left[room])
        x0 = left[a] + wide * (out.index(b) + 1) / (len(out) + 1)
        x1 = left[b] + wide * (into.index(a) + 1) / (len(into) + 1)
        lines.append(f'<path d="{way(a, b, x0, x1)}" marker-end="url(#head)"/>')
    boxes = [
        f'<rect x="{left[room]:.0f}" y="{top[room]:.0f}" width="{wide}" height="{high}" rx="6"/>'
        f'<text class="room" x="{left[room] + wide / 2:.0f}" y="{top[room] + 22:.0f}">{escape(room)}</text>'
        f'<text class="what" x="{left[room] + wide / 2:.0f}" y="{top[room] + 40:.0f}">{escape(CAPTIONS.get(room, ""))}</text>'
        for room in left
    ]
    bands = []
    for name, first, last in STOREYS:
        y0, y1 = top[first] - gap / 2 + 4, top[last] + high + gap / 2 - 4
        bands.append(
            f'<rect class="band" x="8" y="{y0:.0f}" width="{width - 16}" height="{y1 - y0:.0f}" rx="8"/>'
            f'<text class="storey" x="20" y="{(y0 + y1) / 2 + 5:.0f}">{escape(name)}</text>'
        )
    style = (
        "svg{background:#fff}path{fill:none;stroke:#5b7196;stroke-width:1.4}#head path{fill:#5b7196;stroke:none}"
        "rect{fill:#fff;stroke:#41587a}.band{fill:#f1f4f9;stroke:none}text{font-family:sans-serif;text-anchor:middle;fill:#1c2a3f}"
        ".room{font-size:15px;font-weight:bold}.what{font-size:11px;fill:#51627d}.storey{font-size:14px;font-style:italic;text-anchor:start}"
    )
    marker = 'id="head" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    head = f'<defs><marker {marker}><path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    head += f'<rect width="{width}" height="{height}" style="stroke:none"/>'
    body = "\n".join([*bands, *lines, *boxes])
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>\n{head}\n{body}\n</svg>\n'


def main() -> None:
    sys.path.insert(0, str(ROOT))
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    for name, value in numbers(graph).items():
        print(f"{name}: {value}")
    if "--draw" in sys.argv[1:]:
        (ROOT / "docs" / "architecture.svg").write_text(draw(arrows(graph)))


if __name__ == "__main__":
    main()
