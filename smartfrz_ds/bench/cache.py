"""`smartfrz bench cache`: steps of MiniLM-L6 on BBC with nothing frozen, with a frozen prefix, and with the prefix cache, in one process.

Three copies of the model take turns step by step, so that a busy machine slows all of them. Each epoch deals the rows out anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smartfrz_ds
from smartfrz_ds.bench.policies.nets import minilm_on_bbc
from smartfrz_ds.bench.policies.setups.data import Batch
from smartfrz_ds.integrations.torch import TorchController

COPIES = ("full", "frozen", "cached")


class _Copy:
    """One copy of the model with its optimizer and controller."""

    def __init__(self, name: str, model: nn.Module, blocks: int) -> None:
        self.model = model
        self.seconds: list[list[float]] = []  # of each epoch
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
        # The copies take turns, so the time between two steps of one says nothing about its gain.
        cache = {"mode": "auto" if name == "cached" else "off", "min_gain": 1}
        self.controller: TorchController = smartfrz_ds.attach_torch(model, self.optimizer, {"policy": "manual", "cache": cache})
        if name != "full":
            self.controller.freeze(self.controller.layers[: 1 + blocks])
        model.train()

    def step(self, batch: Batch, seed: int) -> float:
        """Train on a batch and return its loss; the dropout of all copies draws the same numbers."""
        inputs, answers = batch
        torch.manual_seed(seed)
        began = time.perf_counter()
        loss = F.cross_entropy(self.model(**inputs).logits, answers)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seconds[-1].append(time.perf_counter() - began)
        return loss.item()


def bench_cache(out: Path, *, blocks: Sequence[int] = (3, 4, 5), rows: int = 96, batch: int = 8, length: int = 64, epochs: int = 3) -> str:
    """Measure the steps and make the table, which is also written to `out`/cache.md.

    Args:
        out: Folder for cache.md and cache.json.
        blocks: Numbers of frozen blocks of the six, each in 1 to 5; the embeddings are frozen, too.
        rows: Rows of an epoch, at least two batches.
        batch: Rows of a batch.
        length: Tokens of a row.
        epochs: Number of epochs, at least 3: in the first one no row is stored yet, and the second one has the proof.

    Returns:
        The table as Markdown.

    Raises:
        ValueError: A number out of range.
    """
    if not blocks or min(blocks) < 1 or max(blocks) > 5:
        raise ValueError(f"--blocks: got {list(blocks)}; allowed: numbers in 1 to 5")
    for name, value, least in (("rows", rows, 2 * batch), ("batch", batch, 1), ("length", length, 1), ("epochs", epochs, 3)):
        if value < least:
            raise ValueError(f"--{name}: got {value}; allowed: at least {least}")
    results = [_measure(count, rows, batch, length, epochs) for count in blocks]
    text = table(results, rows=rows, batch=batch, length=length, epochs=epochs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "cache.json").write_text(json.dumps(results, indent=1))
    (out / "cache.md").write_text(text)
    return text


def _measure(blocks: int, rows: int, batch: int, length: int, epochs: int) -> dict[str, Any]:
    copies = {}
    for name in COPIES:
        torch.manual_seed(0)
        model, data = minilm_on_bbc(length, rows)
        copies[name] = _Copy(name, model, blocks)
    prefix = _time_prefix(copies["frozen"].model, blocks)
    losses: dict[str, list[float]] = {name: [] for name in COPIES}
    step = 0
    for epoch in range(epochs):
        for copy in copies.values():
            copy.seconds.append([])
        for one in _epoch(data, batch, epoch):
            for name, copy in copies.items():
                losses[name].append(copy.step(one, step))
            step += 1
    result = {
        "blocks": blocks,
        "seconds": {name: median(copy.seconds[-1]) for name, copy in copies.items()},
        "prefix": median(prefix[-len(copies["frozen"].seconds[-1]) :]),
        "equal": losses["frozen"] == losses["cached"] and torch.equal(*(_weights(copies[x].model) for x in ("frozen", "cached"))),
        "note": copies["cached"].controller.report().cache_note,
    }
    for copy in copies.values():
        copy.controller.detach()
    return result


def _time_prefix(model: nn.Module, blocks: int) -> list[float]:
    """Return a list that gets the seconds from the beginning of each forward to the end of its last frozen block."""
    seconds: list[float] = []
    began = 0.0

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        seconds.append(time.perf_counter() - began)

    model.register_forward_pre_hook(begin)
    model.get_submodule(f"bert.encoder.layer.{blocks - 1}").register_forward_hook(end)
    return seconds


def _epoch(data: Batch, batch: int, epoch: int) -> Iterator[Batch]:
    inputs, answers = data
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(epoch))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        yield {k: v[chosen] for k, v in inputs.items()}, answers[chosen]


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def table(results: Sequence[dict[str, Any]], *, rows: int, batch: int, length: int, epochs: int) -> str:
    """Make the table of these results, as Markdown."""
    lines = [
        f"MiniLM-L6 on BBC, {rows} rows of {length} tokens, batches of {batch}, AdamW, one process, {torch.get_num_threads()} thread(s).",
        f"Medians over the steps of epoch {epochs}, in ms; the copies take turns. Prefix: the forward of the frozen layers. Predicted:",
        "the frozen step without it.",
        "",
        "| frozen blocks of 6 | full | frozen (÷ full) | prefix | cached (÷ full) | ÷ frozen | ÷ predicted | losses, weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        full, frozen, cached = (r["seconds"][name] for name in COPIES)
        predicted = frozen - r["prefix"]
        cells = [
            r["blocks"],
            _ms(full),
            f"{_ms(frozen)} ({frozen / full:.2f})",
            _ms(r["prefix"]),
            f"**{_ms(cached)}** ({cached / full:.2f})",
        ]
        cells += [f"{cached / frozen:.2f}", f"{cached / predicted:.2f}", "equal" if r["equal"] else "**differ**"]
        lines.append(f"| {' | '.join(str(c) for c in cells)} |")
    lines += ["", *(f"- {r['blocks']} blocks: {r['note']}" for r in results)]
    return "\n".join(lines) + "\n"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
