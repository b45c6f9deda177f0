"""Draw docs/step.svg: what a step does before and after the front half of eight layers freezes. `python docs/step.py` writes it.

The numbers are the row ZeRO-2 fp32 of the first table in docs/results.md; tests/unit/test_site.py compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

LAYERS, FROZEN = 8, 4
# Measured: share of the unfrozen step's time, MB that a rank passes to collectives in a step, MB of optimizer state on a rank.
TIME, TRAFFIC, STATE = (1.0, 0.54), (303, 152), (227, 114)
ROWS = [
    ("forward", "#4477aa", False),
    ("backward", "#228833", True),
    ("gradients reduced", "#ccbb44", True),
    ("optimizer state", "#aa3377", True),
    ("weights gathered", "#ee8866", True),
]
CELL, GAP, LEFT, TOP, PANEL = 32, 4, 150, 66, 350


def panel(x: int, title: str, frozen: int, index: int) -> Iterator[str]:
    yield f'<text class="title" x="{x}" y="30">{title}</text>'
    for layer in range(LAYERS):
        mark = "❄" if layer < frozen else str(layer)
        yield f'<text class="small" x="{x + layer * (CELL + GAP) + CELL // 2}" y="{TOP - 10}" text-anchor="middle">{mark}</text>'
    for row, (_, color, leaves) in enumerate(ROWS):
        for layer in range(LAYERS):
            gone = leaves and layer < frozen
            style = 'class="gone"' if gone else f'fill="{color}"'
            yield f'<rect x="{x + layer * (CELL + GAP)}" y="{TOP + row * (CELL + GAP)}" width="{CELL}" height="{CELL}" rx="3" {style}/>'
    y, full = TOP + len(ROWS) * (CELL + GAP) + 14, LAYERS * (CELL + GAP) - GAP
    for offset, measured, unit, color in (
        (0, TIME, "× time", "#4477aa"),
        (26, TRAFFIC, " MB sent", "#ccbb44"),
        (52, STATE, " MB state", "#aa3377"),
    ):
        yield f'<rect class="track" x="{x}" y="{y + offset}" width="{full}" height="18" rx="3"/>'
        yield f'<rect x="{x}" y="{y + offset}" width="{full * measured[index] / measured[0]:.0f}" height="18" rx="3" fill="{color}"/>'
        yield f'<text class="bar" x="{x + 6}" y="{y + offset + 13}">{measured[index]:g}{unit}</text>'


def draw() -> str:
    """The figure's text."""
    height = TOP + len(ROWS) * (CELL + GAP) + 104
    width = LEFT + 2 * PANEL
    style = (
        "svg{background:#fff}text{font-family:sans-serif;font-size:13px;fill:#1c2a3f}.title{font-size:15px;font-weight:bold}"
        ".small{font-size:12px}.bar{font-size:12px;font-weight:bold;fill:#fff;paint-order:stroke;stroke:#1c2a3f;stroke-width:2px}"
        ".gone{fill:none;stroke:#9aa5b4;stroke-dasharray:3 3}.track{fill:#e9edf2}"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"><style>{style}</style>'
    ]
    lines.append(f'<rect width="{width}" height="{height}" fill="#fff"/><text class="small" x="12" y="{TOP - 10}">layer</text>')
    for row, (name, _, _) in enumerate(ROWS):
        lines.append(f'<text x="12" y="{TOP + row * (CELL + GAP) + 21}">{name}</text>')
    lines.append(f'<text x="12" y="{TOP + len(ROWS) * (CELL + GAP) + 28}">a step, measured</text>')
    lines += panel(LEFT, "before", 0, 0)
    lines += panel(LEFT + PANEL, f"after layers 0 to {FROZEN - 1} freeze", FROZEN, 1)
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "step.svg").write_text(draw(), encoding="utf-8")
