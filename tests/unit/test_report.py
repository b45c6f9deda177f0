"""`smartfrz report`: what it says of logs that real `EventLog`s wrote, and that a browser shows it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from smartfrz_ds.telemetry import report_charts
from smartfrz_ds.telemetry.event_log import EventLog
from smartfrz_ds.telemetry.events import FreezeEvent, Record, RunStart, Status
from smartfrz_ds.telemetry.recorded_run import find_log, load_run
from smartfrz_ds.telemetry.report import summary, write_report
from smartfrz_ds.telemetry.words import matched, matched_steps

pytest.importorskip("matplotlib")
CHARTS = ("frozen", "probabilities", "loss", "step-time", "optimizer", "gradients", "savings", "learning-rate")


def start(step: int = 0, *, blocks: int = 4, frozen: tuple[str, ...] = (), dry_run: bool = False) -> RunStart:
    names = ("embeddings", *(f"blocks.{i}" for i in range(blocks)), "head")
    kinds = ("embedding", *["block"] * blocks, "head")
    return RunStart(
        step=step,
        time=1.79e9 + step,
        layers=names,
        kinds=kinds,
        weights=(100, *[50] * blocks, 10),
        frozen=frozen,
        policy="attention",
        engine="ZeRO-2",
        version="0.1.0",
        ranks=2,
        total_steps=100,
        dry_run=dry_run,
    )


def status(step: int, frozen: tuple[str, ...] = (), **other: object) -> Status:
    share = len(frozen) / 6
    usual: dict[str, object] = {
        "loss": 4 * math.exp(-step / 30),
        "step_seconds": 0.5 - 0.25 * share,
        "optimizer_bytes": int(6e6 * (1 - share)),
        "gradient_bytes": int(1.5e6 * (1 - share)),
        "saved_flops_fraction": share / 4,
        "hours_saved": share / 100 - 0.0001,
        "lr": 1e-4,
    }
    return Status(step=step, time=1.79e9 + step, frozen=frozen, **usual | other)  # type: ignore[arg-type]


def freeze(step: int, layers: tuple[str, ...], frozen: tuple[str, ...], **other: object) -> FreezeEvent:
    reasons = dict.fromkeys(layers, f"probability 0.9{step % 10} >= 0.9, twice")
    usual: dict[str, object] = {"probabilities": {"blocks.0": 0.95, "blocks.3": 0.25}, "reasons": reasons, "seconds": 0.2}
    usual["bytes_released_total"] = 10**6 * len(layers)
    return FreezeEvent(kind="freeze", step=step, layers=layers, frozen=frozen, **usual | other)  # type: ignore[arg-type]


def decision(step: int, frozen: tuple[str, ...] = ()) -> FreezeEvent:
    probabilities = {"blocks.0": min(1.0, step / 40), "blocks.3": math.nan}
    return FreezeEvent(kind="decision", step=step, frozen=frozen, probabilities=probabilities)


FRONT = ("embeddings", "blocks.0")
MORE = (*FRONT, "blocks.1")
RUN: list[Record] = [
    FreezeEvent(kind="warning", step=0, message="this <DeepSpeed> & that were not tested"),
    start(),
    decision(20),
    status(20),
    freeze(40, FRONT, FRONT),
    status(40, FRONT),
    status(60, FRONT),
    freeze(70, ("blocks.1",), MORE),
    status(80, MORE),
    FreezeEvent(kind="thaw", step=90, layers=("blocks.1",), frozen=FRONT, reasons={"blocks.1": "guard: the smoothed metric is 2.5"}),
    status(100, FRONT),
]


def log_of(folder: Path, records: list[Record], name: str = "freezing.jsonl") -> Path:
    log = EventLog(folder / name)
    for record in records:
        log.write(record)
    return folder / name


class Page(HTMLParser):
    """Tags, text, and everything that a browser would fetch."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.source = page.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.fetched.append(value or "")
            if key == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    log_of(folder, RUN)
    return write_report(folder)


# ---- the page


def test_page_holds_everything_and_needs_nothing(page: Path) -> None:
    assert page.parts[-2:] == ("report", "report.html")
    seen = Page(page)
    assert seen.tags.count("svg") == len(CHARTS) and [i for i in seen.ids if i in CHARTS] == list(CHARTS)
    assert len(seen.ids) == len(set(seen.ids)), "ids of the charts clash"
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in seen.fetched), seen.fetched
    assert "@import" not in seen.source and not re.search(r"url\((?!#)", seen.source)
    assert "<!--" not in seen.source and "script" not in seen.tags
    # what a run says is text
    assert "this <DeepSpeed> & that were not tested" in seen.text and "deepspeed" not in seen.tags
    # colours are the page's, so that they follow light and dark
    svg = seen.source[seen.source.index("<svg") : seen.source.rindex("</svg>")]
    assert "var(--frozen)" in svg and "var(--mark)" in svg and "#1c2330" not in svg
    for name in CHARTS:
        data = (page.parent / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG") and width > 900 and height > 150
    assert sorted(p.name for p in page.parent.iterdir()) == sorted([*(f"{name}.png" for name in CHARTS), "report.html"])


def test_words_at_the_top(tmp_path: Path) -> None:
    lines = summary(load_run(log_of(tmp_path, RUN)))
    assert lines == [
        "At step 100 of 100, 2 of 6 layers are frozen: embeddings, blocks.0.",
        "What froze, or why not: froze embeddings, blocks.0 at step 40, blocks.1 at step 70; 1 thaw, 1 of them by the guard; 2 of 6 layers "
        "frozen now: embeddings, blocks.0.",
        "8.3 % of the training FLOPs so far were saved (a full run of 92 of 100 steps costs the same), and an estimated 11.6 s of time.",
        "Optimizer memory over all ranks: 6 MB → 4 MB (−33 %); gradients sent per step: 1.5 MB → 1 MB (−33 %).",
        "A step took 500 ms → 417 ms (−17 %) (medians, before the first freeze and last).",
        "2 freezes and 1 thaw stopped training for 400 ms in total, 200 ms at most.",
        "The guard undid 1 freeze because the metric had become worse (see the table).",
    ]


def test_what_was_before_is_known_where_the_first_status_has_frozen_layers(tmp_path: Path) -> None:
    """Of the start line and of the timed steps; of an old log at least the bytes that the freezes released."""
    first = freeze(10, FRONT, FRONT, bytes_released_total=2_000_000)
    new = dataclasses.replace(start(), optimizer_bytes=6_000_000, gradient_bytes=1_500_000)
    late = [status(20, FRONT, usual_seconds=0.5), status(40, FRONT, usual_seconds=0.5)]
    lines = summary(load_run(log_of(tmp_path / "new", [new, first, *late])))
    assert "Optimizer memory over all ranks: 6 MB → 4 MB (−33 %); gradients sent per step: 1.5 MB → 1 MB (−33 %)." in lines
    assert "A step took 500 ms → 417 ms (−17 %) (medians, before the first freeze and last)." in lines
    lines = summary(load_run(log_of(tmp_path / "old", [start(), first, status(20, FRONT), status(40, FRONT)])))
    assert "Optimizer memory over all ranks: 6 MB → 4 MB (−33 %)." in lines and not any("A step took" in line for line in lines)


def test_a_page_without_freezes_and_in_one_process(tmp_path: Path) -> None:
    """No word of lines that aren't there, no empty chart, and why nothing froze: as the run told it, or read off its events."""
    alone = {"gradient_bytes": 0}
    log_of(tmp_path, [dataclasses.replace(start(), first_stage=200), decision(20), status(20, **alone), status(40, **alone)])
    page = Page(write_report(tmp_path))
    assert "Lines mark the freezes" not in page.text and [i for i in page.ids if i in CHARTS] == [c for c in CHARTS if c != "gradients"]
    assert "nothing was frozen: the policy attention was asked at 1 freezing stage; the most certain layer was blocks.0" in page.text
    short = load_run(log_of(tmp_path / "short", [dataclasses.replace(start(), first_stage=200), status(100)]))
    assert "no freezing stage came: the run had 100 steps, the first stage would be at step 200" in summary(short)[1]
    told = load_run(log_of(tmp_path / "told", [start(), status(100, outcome="nothing was frozen: the layers move")]))
    assert summary(told)[1] == "What froze, or why not: nothing was frozen: the layers move."
    log_of(tmp_path / "thawed", RUN)
    assert "Lines mark the freezes (dashed: thaws)." in Page(write_report(tmp_path / "thawed")).text


def test_table_of_events(page: Path) -> None:
    source = page.read_text()
    body = source[source.index("<tbody>") : source.index("</tbody>")]
    rows = [[re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row)] for row in body.split("</tr>")[:-1]]
    assert rows == [
        ["40", "freeze", "embeddings, blocks.0", "2 MB", "200 ms", "probability 0.90 &gt;= 0.9, twice"],
        ["70", "freeze", "blocks.1", "1 MB", "200 ms", "probability 0.90 &gt;= 0.9, twice"],
        ["90", "thaw", "blocks.1", "0 B", "0 ms", "guard: the smoothed metric is 2.5"],
    ]
    assert "1 more decision of the policy did not freeze anything" in source


def test_a_change_that_was_undone(tmp_path: Path) -> None:
    """It is a row of the table with its reason, and a sentence at the top; no chart takes its layers for frozen."""
    why = "freeze failed and was undone on every rank: rank 1: OutOfMemoryError: <no room>"
    failed = FreezeEvent(kind="undone", step=40, layers=FRONT, message=why)
    left_out = FreezeEvent(kind="decision", step=50, layers=FRONT, probabilities={"blocks.0": 0.95})
    log_of(tmp_path, [start(), status(20), failed, status(45), left_out, status(60)])
    run = load_run(tmp_path / "freezing.jsonl")
    assert "1 change failed and was undone; training went on (see the table)." in summary(run)
    assert any(f"nothing was frozen: 1 freeze failed and was undone; step 40: {why}" in line for line in summary(run))
    assert not run.changes() and all(not spans for spans in run.frozen_spans().values())
    source = write_report(tmp_path).read_text(encoding="utf-8")
    row = source[source.index("<tbody>") :].split("</tr>")[0]
    cells = [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row)]
    assert cells == ["40", "undone", "embeddings, blocks.0", "", "", why.replace("<", "&lt;").replace(">", "&gt;")]
    assert '<span class="tag undone">' in row and '<span class="tag decision">left out</span>' in source


def test_spans_in_which_layers_are_frozen(tmp_path: Path) -> None:
    spans = load_run(log_of(tmp_path, RUN)).frozen_spans()
    assert spans == {"embeddings": [(40, 100)], "blocks.0": [(40, 100)], "blocks.1": [(70, 90)], "blocks.2": [], "blocks.3": [], "head": []}


def test_a_dry_run_shows_what_would_be_frozen(tmp_path: Path) -> None:
    wish = FreezeEvent(kind="decision", step=40, layers=FRONT, dry_run=True, probabilities={"blocks.0": 0.9})
    run = load_run(log_of(tmp_path, [start(dry_run=True), status(20), wish, status(60)]))
    assert summary(run)[0] == "A dry run: nothing was frozen. By step 60 of 100 the policy would have frozen 2 of 6 layers."
    assert run.frozen_spans()["blocks.0"] == [(40, 60)]
    assert "would freeze" in write_report(tmp_path).read_text()


# ---- the log


def test_a_resumed_run_is_one_run(tmp_path: Path) -> None:
    """The log was not cut at the resume (another file's position): steps 61 to 100 stand twice in it."""
    records = [
        *RUN,
        start(60, frozen=FRONT),
        status(80, FRONT),
        freeze(85, ("blocks.2",), (*FRONT, "blocks.2")),
        status(100, (*FRONT, "blocks.2")),
    ]
    run = load_run(log_of(tmp_path, records))
    assert [s.step for s in run.statuses] == [20, 40, 60, 80, 100] and len(run.starts) == 2
    assert [e.step for e in run.changes()] == [40, 85] and run.frozen_spans()["blocks.1"] == []
    source = write_report(tmp_path).read_text()
    assert "Dotted: the run was resumed." in source and "<dd>1 time</dd>" in source


def test_an_earlier_run_in_the_same_file_is_left_out_and_said(tmp_path: Path) -> None:
    run = load_run(log_of(tmp_path, [*RUN, start(), status(20)]))
    assert run.last_step == 20 and run.notes == ["the file also has 1 earlier run, not shown in this report"]
    again = load_run(log_of(tmp_path / "second", [start(), start(), status(20), start()]))
    assert again.last_step == 0 and len(again.notes) == 2  # a run that has just begun


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    path = log_of(tmp_path, RUN)
    path.write_bytes(path.read_bytes()[:-9])
    run = load_run(path)
    assert run.last_step == 90 and "torn last line" in run.notes[0]
    assert "torn last line" in write_report(tmp_path).read_text()


def test_an_old_log_without_status_lines(tmp_path: Path) -> None:
    log_of(tmp_path, [record for record in RUN if isinstance(record, FreezeEvent)])
    page = Page(write_report(tmp_path, tmp_path / "out"))
    assert [i for i in page.ids if i in CHARTS] == ["frozen", "probabilities"]
    assert "there are no status lines" in page.text and "At step 90, 2 of 4 layers are frozen" in page.text


def test_numbers_that_are_not_known_leave_gaps(tmp_path: Path) -> None:
    nothing = {"loss": None, "step_seconds": None, "gradient_bytes": None, "hours_saved": None}
    log_of(tmp_path, [start(), status(20, **nothing), freeze(40, FRONT, FRONT), status(60, FRONT, **nothing)])
    page = Page(write_report(tmp_path))
    assert [i for i in page.ids if i in CHARTS] == ["frozen", "probabilities", "optimizer", "savings", "learning-rate"]
    assert "the time saved is unknown" in page.text


@pytest.mark.parametrize("blocks", [46, 300])
def test_names_of_layers_do_not_overlap(tmp_path: Path, blocks: int) -> None:
    """Read off the SVG: the lines of text at the left are at least as far from each other as they are high."""
    log_of(tmp_path, [start(blocks=blocks), decision(20), status(20), freeze(40, FRONT, FRONT), status(60, FRONT)])
    source = write_report(tmp_path).read_text()
    svg = source[source.index('<section id="frozen"') : source.index('<section id="probabilities"')]
    texts = re.findall(r'<text style="font-size: 9px[^>]*? x="[^"]*" y="([^"]*)"[^>]*>([^<]*)', svg)
    heights = sorted(float(y) for y, text in texts if text.startswith(("embeddings", "blocks", "head")))
    assert 3 <= len(heights) <= 80
    assert min(b - a for a, b in pairwise(heights)) >= 10.5  # of letters of 9 points


def test_folders_without_a_log_or_with_several(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        find_log(tmp_path / "none")
    (tmp_path / "other.jsonl").write_text('{"some": "thing"}\n')
    with pytest.raises(ValueError, match=r'no smartfrz log found .* "log_path" is set'):
        find_log(tmp_path)
    deep = log_of(tmp_path / "attention", RUN)
    assert find_log(tmp_path) == deep == find_log(deep)
    log_of(tmp_path / "linear", RUN)
    with pytest.raises(ValueError, match=r"several logs; name one of them: .*attention.*linear"):
        find_log(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="the log is empty"):
        load_run(tmp_path / "empty.jsonl")


def freeze_lines(svg: str) -> set[float]:
    """Horizontal positions of the vertical lines in the colour of freezes, as shares of the picture's width."""
    width = float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0])
    lines = re.findall(r'<path d="M ([\d.]+) [\d.]+ \nL \1 [\d.]+ \n" [^>]*stroke: var\(--mark\)', svg)
    return {round(float(x) / width, 4) for x in lines}


def test_a_freeze_has_one_place_in_all_charts(tmp_path: Path) -> None:
    """Long names, few and many rows, one panel and two: the lines of the freezes continue from chart to chart."""
    run = load_run(log_of(tmp_path, [start(blocks=30), *RUN[1:]]))
    places = {chart.name: freeze_lines(chart.svg) for chart in report_charts.charts(run)}
    assert set(places) == set(CHARTS)
    steps = {e.step for e in run.changes()}
    assert len(places["frozen"]) == len(steps) > 1
    assert all(found == places["frozen"] for found in places.values()), places


def test_stages_the_threshold_the_guard_the_cache_and_metrics_are_shown(tmp_path: Path) -> None:
    pipeline = dataclasses.replace(start(), threshold=0.9, entries=(0, 1, 2, 3, 4, 5), bounds=(0, 3, 6))
    names = pipeline.layers
    records: list[Record] = [
        pipeline,
        FreezeEvent(kind="decision", step=10, probabilities={names[0]: 0.95, names[1]: 0.4}),
        status(10, metrics={"val": 1.0}),
        FreezeEvent(kind="freeze", step=20, layers=names[:2], frozen=names[:2], probabilities={names[0]: 0.95, names[1]: 0.97}),
        FreezeEvent(kind="cache", step=21, frozen=names[:2], message="on"),
        FreezeEvent(kind="rebalance", step=25, frozen=names[:2], bounds=(0, 4, 6), gain=1.2),
        FreezeEvent(kind="thaw", step=28, layers=names[:2], reasons={names[0]: "guard: worse"}),
        status(30, metrics={"val": 2.0}),
    ]
    charts = {chart.name: chart for chart in report_charts.charts(load_run(log_of(tmp_path, records)))}
    frozen = charts["frozen"]
    assert "borders of the pipeline's stages" in frozen.about and "Crosses" in frozen.about and "Triangles" in frozen.about
    borders = re.findall(r'd="M ([\d.]+) ([\d.]+) \nL ([\d.]+) \2 \n" [^>]*stroke: var\(--ink\); stroke-width: 1.4', frozen.svg)
    assert len(borders) == 2 and borders[0][2] == borders[1][0] and float(borders[0][1]) < float(borders[1][1]), borders
    assert "threshold of 0.9" in charts["probabilities"].about and "val" in charts["metrics"].svg
    assert charts["probabilities"].svg.count("<use") > 3  # the dots


def test_foreign_lines_are_skipped_and_the_page_says_so(tmp_path: Path) -> None:
    path = log_of(tmp_path, RUN)
    lines = path.read_text().splitlines(keepends=True)
    whole = summary(load_run(path))
    path.write_text("".join(["nonsense\n", *lines[:3], '{"kind": "melt"}\n', *lines[3:]]))
    assert summary(load_run(path)) == whole
    page = write_report(tmp_path).read_text()
    assert "skipped line 1, which is not a record of this package" in page and "1 more such lines" in page
    path.write_text("nonsense\n" * 3)
    with pytest.raises(ValueError, match="no line of this file is a record"):
        write_report(path)


# ---- the browser


def browser() -> str | None:
    return next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


@pytest.mark.skipif(browser() is None, reason="no chromium or google-chrome here (./tests/run.sh --system installs chromium)")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    """Headless Chromium draws the page in a wide and in a narrow window, and says what it sees: nothing sticks out, nothing is empty."""
    names = [f"transformer.decoder.layers.{i}" for i in range(48)]
    probabilities = {name: i / 48 for i, name in enumerate(names)}
    begin = RunStart(step=0, time=1.79e9, layers=tuple(names), kinds=("block",) * 48, weights=(9,) * 48)
    first = freeze(30, tuple(names[:20]), tuple(names[:20]), probabilities=probabilities, reasons={n: f"of {n}" for n in names[:20]})
    log_of(tmp_path, [begin, status(20), first, status(40, tuple(names[:20])), status(60, tuple(names[:20]))])
    page = write_report(tmp_path)
    probe = """<script>addEventListener("load", () => {
      const seen = {wider: document.documentElement.scrollWidth - innerWidth, charts: [], overlaps: 0};
      for (const svg of document.querySelectorAll("svg")) {
        const box = svg.getBoundingClientRect();
        seen.charts.push([Math.round(box.width), Math.round(box.height)]);
        const texts = [...svg.querySelectorAll("text")].filter(t => t.textContent.trim()).map(t => t.getBoundingClientRect());
        for (const t of texts) if (t.left < box.left - 1 || t.right > box.right + 1 || t.bottom > box.bottom + 1) seen.overlaps += 1000;
        texts.forEach((a, i) => texts.slice(i + 1).forEach(b => {
          const x = Math.min(a.right, b.right) - Math.max(a.left, b.left), y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
          if (x > 1 && y > 4) seen.overlaps += 1;
        }));
      }
      document.title = JSON.stringify(seen);
    });</script>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{probe}</body>"))
    program = browser()
    assert program is not None
    for width in (1200, 500):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
        command = [program, *flags, "--virtual-time-budget=2000", "--dump-dom", probed.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        title = re.search(r"<title>(.*?)</title>", done.stdout)
        assert title is not None, done.stderr[-2000:]
        seen = json.loads(title.group(1))
        assert seen["wider"] <= 0, f"the page is wider than its window of {width}"
        assert len(seen["charts"]) == len(CHARTS) and all(w >= 450 and h >= 150 for w, h in seen["charts"]), seen
        assert seen["overlaps"] == 0, "labels overlap or stick out"


# ---- without matplotlib


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path) -> None:
    log_of(tmp_path, RUN)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    # an import that fails as if nothing of that name were installed
    (hidden / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'matplotlib':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    command = [str(Path(sys.executable).with_name("smartfrz")), "report", str(tmp_path)]
    paths = os.pathsep.join([str(hidden), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: matplotlib is missing: pip install 'smartfrz_ds[report]'"


def test_the_matched_run_beside_a_saving() -> None:
    assert [matched_steps(300, saved) for saved in (0.0, 0.152, 0.9999, 1.0)] == [300, 254, 1, 1]
    assert matched(12_000, 0.25) == "a full run of 9,000 of 12,000 steps costs the same"
