"""The markers of pyproject.toml, as conftest.py and run.sh apply them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT, TESTS, run_worker

TEST_FILE = """
import pytest

def test_plain(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.distributed(2)
def test_ranks(): pass

@pytest.mark.gpu
def test_gpu(): pass

@pytest.mark.multigpu(2)
def test_gpus(): pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the tests' set-up with one file in unit/ and one outside it."""
    for name in ("conftest.py", "helpers.py", "rank_pool.py", "run.sh"):
        (tmp_path / "tests").mkdir(exist_ok=True)
        shutil.copy(TESTS / name, tmp_path / "tests" / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("unit", "engines"):
        (tmp_path / "tests" / folder).mkdir()
        (tmp_path / "tests" / folder / f"test_{folder}.py").write_text(TEST_FILE)
    return tmp_path


def test_unit_is_what_starts_no_ranks_and_gpu_tests_are_skipped_without_gpus(project: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-v", "-m", "unit and not slow", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=project, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False)
    lines = {line.split("::")[1].split()[0]: line for line in done.stdout.splitlines() if "::" in line and "%]" in line}
    assert lines.keys() == {"test_plain", "test_gpu", "test_gpus"}, done.stdout + done.stderr
    assert "tests/unit/" in lines["test_plain"] and "PASSED" in lines["test_plain"]
    assert "SKIPPED" in lines["test_gpu"] and "SKIPPED" in lines["test_gpus"]
    assert "needs 1 GPU, found 0" in done.stdout and "needs 2 GPUs, found 0" in done.stdout


def test_a_unit_test_cannot_start_ranks(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"distributed\(n\)"):
        run_worker("exact", {}, tmp_path)


TWO = "-n 2 --dist loadfile"  # processes that share the test files
GPU_RUN = "-m not slow tests/gpu tests/engines/test_exact.py"


@pytest.mark.parametrize(
    ("found", "arguments", "code", "expected"),
    [
        ("cuda", ["--gpu"], 0, f"cuda {GPU_RUN}"),
        ("xpu", ["--gpu", "tests/gpu", "-x"], 0, "xpu -m not slow tests/gpu -x"),
        ("", ["--gpu"], 2, "torch sees no GPU here. Run ./tests/run.sh,"),
    ],
)
def test_run_sh_takes_the_accelerator_of_the_machine(project: Path, found: str, arguments: list[str], code: int, expected: str) -> None:
    launch = project / "launch"
    launch.mkdir()
    python = f'case $1 in -c) echo "{found}" ;; *) echo "$DS_ACCELERATOR ${{*:3}}" ;; esac'
    (launch / "_venv.sh").write_text(f'smartfrz_venv() {{ python() {{ {python}; }}; }}\nexec() {{ "$@"; }}\n')
    command = ["bash", "tests/run.sh", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert (done.stderr if code else done.stdout.splitlines()[-1]).find(expected) >= 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], f"{TWO} -m not slow"),
        (["--slow"], ""),
        (["-m", "unit"], f"{TWO} -m (unit) and not slow"),
        (["-m", "unit or gpu", "-x"], f"{TWO} -m (unit or gpu) and not slow -x"),
        (["-munit", "--slow"], "-m unit"),
        (["-m", "slow and not net"], f"{TWO} -m slow and not net"),
        (["tests/unit", "-k", "a b"], f"{TWO} -m not slow tests/unit -k a b"),
        (["-n", "0"], "-n 0 --dist loadfile -m not slow"),
    ],
)
def test_run_sh_combines_the_markers(project: Path, arguments: list[str], expected: str) -> None:
    launch = project / "launch"
    launch.mkdir()
    (launch / "_venv.sh").write_text('die() { echo "$1" >&2; exit 2; }\nsmartfrz_venv() { python() { echo "$*"; }; }\nexec() { "$@"; }\n')
    done = subprocess.run(["bash", "tests/run.sh", *arguments], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"-m pytest {expected}".rstrip()


def test_no_two_files_of_tests_have_one_name() -> None:
    """Folders of tests are no packages: pytest would take the second file for the first, and run neither's tests in that process."""
    names = Counter(file.name for file in TESTS.rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []
