"""The documentation site: it builds strictly, loads nothing from outside, and its lists are complete."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import typer
from docs_blocks import ROOT

from smartfrz_ds.cli.main import app
from smartfrz_ds.telemetry.events import Status, read_log

needs_mkdocs = pytest.mark.skipif(find_spec("mkdocs") is None, reason="the site needs pip install -c constraints.txt -e '.[docs]'")


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(folder / ".mkdocs.yml"), "-d", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@needs_mkdocs
def test_the_site_builds_strictly_and_lists_every_page(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    llms = (tmp_path / "llms.txt").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        (sentence,) = re.findall(rf"^- \[[^\]]+\]\({page.name}\): (.*)$", llms, re.MULTILINE)
        assert len(sentence.split()) > 3, f"llms.txt: {page.name} begins with no sentence"
        assert (tmp_path / page.name).is_file() and (tmp_path / f"{page.stem}.html").is_file()
    assert "smartfrz bench zero" in (tmp_path / "cli.html").read_text()
    assert "autofreeze.quantile" in (tmp_path / "configuration.html").read_text()


@needs_mkdocs
def test_a_broken_page_fails_the_build(tmp_path: Path) -> None:
    """A missing page, a missing heading, a page that is in no section, and an image from outside: each is named."""
    config = (ROOT / ".mkdocs.yml").read_text()
    (tmp_path / "docs").mkdir()
    (tmp_path / ".mkdocs.yml").write_text(config[: config.index("nav:")] + "nav: [index.md, changelog.md, predictor-card.md]\n")
    shutil.copy(ROOT / "docs/site_build.py", tmp_path / "docs")
    for name in ("CHANGELOG.md", "smartfrz_ds/predictor/default.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# A page\n")
    page = (
        "# Index\n[a](nowhere.md) [b](#no-such-heading) [c](../nofile.py)\n\n::: smartfrz_ds.nothing\n\n![d](https://example.org/x.png)\n"
    )
    (tmp_path / "docs/index.md").write_text("# Index\n\nA page.\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0
    (tmp_path / "docs/index.md").write_text(page.replace("::: smartfrz_ds.nothing\n\n", ""))
    (tmp_path / "docs/alone.md").write_text("# Alone\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for named in ("nowhere.md", "no-such-heading", "alone.md", "https://example.org/x.png"):
        assert named in done.stderr, named


def test_the_page_of_commands_names_them_all() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    command: Any = typer.main.get_command(app)
    assert [name for name in command.commands if f"`smartfrz {name}`" not in page] == []


def script(name: str) -> Any:
    """A script of docs/, as a module."""
    spec = spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_a_run_is_drawn_from_its_log() -> None:
    drawn = script("run").draw(ROOT / "docs/run.jsonl")
    assert drawn == (ROOT / "docs/run.svg").read_text(), "run: python docs/run.py docs/run.jsonl"
    assert "7.9 % of the run's FLOPs" in (ROOT / "README.md").read_text()
    assert [r.saved_flops_fraction for r in read_log(ROOT / "docs/run.jsonl") if isinstance(r, Status)][-1] == pytest.approx(
        0.079, abs=5e-4
    )


def test_the_picture_of_a_step_shows_the_measured_numbers() -> None:
    step = script("step")
    assert step.draw() == (ROOT / "docs/step.svg").read_text(), "run: python docs/step.py"
    results = (ROOT / "docs/results.md").read_text()
    (row,) = [line for line in results.splitlines() if line.startswith("| ZeRO-2 fp32 |")]
    assert f"| {step.TIME[1]:g} |" in row and row.endswith(f"| {step.TRAFFIC[0]}, 227, {step.TRAFFIC[1]} |")
    assert f"{step.STATE[0]} to {step.STATE[1]} MB" in results
