"""Draw docs/run.svg: step time and optimizer memory of a run, with its freezes marked.

./launch/torchrun.sh 2 -- launch/examples/pretrain_fsdp.py --ddp --steps 250 --blocks 8 --width 128 --length 32 --batch-size 4 --out DIR
python docs/run.py DIR/events.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from smartfrz_ds import FreezeEvent
from smartfrz_ds.telemetry.events import RunStart, Status, read_log

WIDTH, LEFT, PLOT, HEIGHT, TOP = 860, 150, 690, 90, 44


def curve(x: Sequence[float], y: Sequence[float], top: int, color: str, *, since_last: bool) -> str:
    """A line in steps: each value holds from the status before it (`since_last`), or from its own status on."""
    heights = [top + HEIGHT * (1 - value / (1.1 * max(y))) for value in y]
    order = "V{b:.1f} H{a:.1f}" if since_last else "H{a:.1f} V{b:.1f}"
    path = f"M{LEFT},{heights[0]:.1f} " + " ".join(order.format(a=a, b=b) for a, b in zip(x, heights, strict=True))
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2.5"/>'


def draw(log: Path) -> str:
    """The figure's text."""
    records = list(read_log(log))
    status = [r for r in records if isinstance(r, Status) and r.step_seconds]
    freezes = [r for r in records if isinstance(r, FreezeEvent) and r.kind == "freeze"]
    layers = next(len(r.layers) for r in records if isinstance(r, RunStart))
    last = status[-1].step

    def at(step: int) -> float:
        return LEFT + PLOT * step / last

    x = [at(r.step) for r in status]
    rows = [
        ("step time", "#4477aa", [1e3 * (r.step_seconds or 0) for r in status], "ms"),
        ("optimizer memory", "#aa3377", [r.optimizer_bytes / 1e6 for r in status], "MB"),
    ]
    style = "svg{background:#fff}text{font-family:sans-serif;font-size:12px;fill:#1c2a3f}.n{font-size:13px;font-weight:bold}"
    height = TOP + len(rows) * (HEIGHT + 26) + 16
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"><style>{style}</style>'
    ]
    out.append(f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>')
    out.append(f'<text class="n" x="8" y="{TOP - 14}">layers frozen</text>')
    bottom = TOP + len(rows) * (HEIGHT + 26) - 26
    for event in freezes:
        out.append(f'<path d="M{at(event.step):.1f},{TOP - 8} V{bottom}" stroke="#9aa5b4" stroke-dasharray="4 3"/>')
        label = f"{len(event.frozen)}/{layers}"
        out.append(f'<text x="{at(event.step):.1f}" y="{TOP - 14}" text-anchor="middle">{label}</text>')
    for number, (name, color, values, unit) in enumerate(rows):
        top = TOP + number * (HEIGHT + 26)
        out.append(f'<path d="M{LEFT},{top} V{top + HEIGHT} H{LEFT + PLOT}" fill="none" stroke="#9aa5b4"/>')
        out.append(f'<text class="n" x="8" y="{top + 16}">{name}</text>')
        out.append(f'<text x="8" y="{top + 36}">{values[0]:.0f} → {values[-1]:.0f} {unit}</text>')
        out.append(curve(x, values, top, color, since_last=unit == "ms"))
    out.append(f'<text x="{LEFT}" y="{bottom + 18}">0</text>')
    out.append(f'<text x="{LEFT + PLOT}" y="{bottom + 18}" text-anchor="end">step {last}</text></svg>')
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/run.py DIR/events.jsonl")
    (Path(__file__).parent / "run.svg").write_text(draw(Path(sys.argv[1])), encoding="utf-8")
