"""One version everywhere, and a change log that a release can be cut from."""

from __future__ import annotations

import re
import sys

import pytest
from helpers import ROOT

from smartfrz_ds._version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_one_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "smartfrz_ds._version.__version__"}
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None and cited[1] == __version__


def test_the_change_log_describes_this_version() -> None:
    heads = re.findall(r"^## \[(.*?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [name for name, _ in heads if name != "Unreleased"]
    assert released[0] == __version__
    assert released == sorted(released, key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    assert all(re.fullmatch(r" - \d{4}-\d{2}-\d{2}", rest) for name, rest in heads if name not in ("Unreleased", "0.1.0"))


@pytest.mark.slow
def test_the_script_builds_a_release() -> None:
    """Needs a package index, for the build tools."""
    import subprocess

    done = subprocess.run([str(ROOT / ".ci" / "release"), "--trial"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"smartfrz_ds-{__version__}-py3-none-any.whl" in done.stdout and f"smartfrz_ds-{__version__}.tar.gz" in done.stdout
