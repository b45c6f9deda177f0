"""The wheel: what is in it, and that it works where nothing of this repository is on the path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "smartfrz_ds"
RUN = """
import torch
import smartfrz_ds

assert "site-packages" in smartfrz_ds.__file__, smartfrz_ds.__file__
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(3)), torch.nn.Linear(8, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual"})
front = controller.layers[0]
for step in range(3):
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 0:
        controller.freeze([front])
        before = [p.clone() for p in model[0].parameters()]
assert controller.report().frozen == (front,), controller.report()
assert all(torch.equal(a, b) for a, b in zip(before, model[0].parameters(), strict=True))
from smartfrz_ds.predictor import load_predictor
load_predictor()
print("trained", smartfrz_ds.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the repository, and none of an earlier build gets in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "smartfrz_ds", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next((source / "dist").glob("smartfrz_ds-*.whl"))


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    files = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc" and path.name[0] != "."}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files
    data = {Path(name).name for name in packed if not name.endswith(".py")}
    assert data >= {"py.typed", "default.safetensors", "default.md", "report.html", "policies.yaml", "gpt-pydoc.yaml"}


@pytest.mark.slow
def test_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True)
    # The dependencies of this environment, behind the wheel; its own .pth files, an editable installation among them, are not read.
    own = sysconfig.get_paths(vars={"base": str(venv), "platbase": str(venv)})["purelib"]
    (Path(own) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    config = ROOT / "configs" / "zero2.json"
    assert run(venv / "bin" / "smartfrz", "check-config", config).splitlines()[-1] == f"{config}: ok"
    assert run(python, "-c", RUN).split() == ["trained", f"{own}/smartfrz_ds/__init__.py"]
    listed = """
from smartfrz_ds.bench.policies.files import POLICIES_FILE, find_tasks, read_policies
print(*find_tasks(), *read_policies(POLICIES_FILE).policies)
"""
    assert {"gpt-pydoc", "vit-mnist", "attention"} <= set(run(python, "-c", listed).split())
