"""README.md and docs/: what they name exists, and their code blocks work.

Python blocks that need DeepSpeed are run in tests/integrations/test_docs_run.py.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from docs_blocks import PAGES, ROOT, Block, blocks
from torch import nn
from typer.testing import CliRunner

import smartfrz_ds
from smartfrz_ds import FreezeConfig, Report, TorchController
from smartfrz_ds.cli.main import app

TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
FOLDERS = ("smartfrz_ds", "tests", "launch", "configs", "docs", ".ci")
FILES = [str(f.relative_to(ROOT)) for x in FOLDERS for f in (ROOT / x).rglob("*") if f.is_file() and "__pycache__" not in f.parts]
# Names of files that are not in the repository: a user's, DeepSpeed's, or (docs/frameworks.md) another framework's.
OTHERS = {"train.py", "zero_to_fp32.py", "stage_1_and_2.py", "train_freezing.py", "freeze_verl.py"}
OTHERS |= {"causal.py", "rl.py", "tuner.py", "train_sft.py", "train_rm.py", "train_dpo.py", "ppo_actor.py", "model.py", "fsdp_workers.py"}


def code(text: str) -> Iterator[str]:
    """The code spans and code blocks of a page, one line each."""
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield from block.splitlines()


def names(pattern: str, *, code_only: bool = True) -> list[tuple[str, str]]:
    """(page, match) of a pattern in the code of all pages."""
    found = []
    for page, text in TEXTS.items():
        for part in code(text) if code_only else [text]:
            found += [(page, match) for match in re.findall(pattern, part)]
    return sorted(set(found))


def missing(pairs: list[tuple[str, str]], exists: Any) -> list[str]:
    assert pairs, "the pattern finds nothing: the test can't fail"
    return [f"{page}: {name}" for page, name in pairs if not exists(name)]


# ---- what the pages name


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    without_code = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page} links to {target}"


def test_named_paths_exist() -> None:
    paths = names(r"(?<![\w/.-])((?:smartfrz_ds|tests|launch|configs|docs|\.ci)/[\w./*-]*[\w*/])", code_only=False)
    assert not missing(paths, lambda path: (ROOT / path).exists() or fnmatch.filter(FILES, path))


def test_named_python_files_exist() -> None:
    known = {Path(file).name for file in FILES} | OTHERS
    assert not missing(names(r"[\w/.-]*\w\.py\b", code_only=False), lambda name: (ROOT / name).exists() or Path(name).name in known)


def test_named_tests_exist() -> None:
    assert not missing(names(r"test_\w+\.py", code_only=False), lambda name: any(f.endswith(f"/{name}") for f in FILES))


def resolves(dotted: str) -> bool:
    """Whether `smartfrz_ds.a.b` is a module, or an attribute of one."""
    parts = dotted.split(".")
    if parts[1] in smartfrz_ds.__all__:  # test_module.py imports them
        return True
    for length in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("smartfrz_ds"):
                continue
            # a module for a framework that is not installed: by its text
            file = (ROOT / "/".join(parts[:length])).with_suffix(".py")
            if not file.is_file():
                continue
            text = file.read_text(encoding="utf-8")
            return all(re.search(rf"^(class|def) {name}\b", text, re.MULTILINE) for name in parts[length:])
        return all(hasattr(found, name) and ((found := getattr(found, name)) is not None) for name in parts[length:])
    return False


def test_named_modules_and_functions_exist() -> None:
    assert not missing(names(r"(?<![\w/])(smartfrz_ds(?:\.\w+)+)(?![\w/])(?!\.\w+/)"), resolves)


def test_named_controller_attributes_exist() -> None:
    known = {*dir(TorchController), *TorchController.__annotations__, "last_checkpoint", "total_steps", "config", "step"}
    found = names(r"(?:\bcontroller|\bengine\.smartfrz|\baccelerator\.smartfrz)\.([a-z]\w*)")
    assert not missing(found, known.__contains__)
    assert not missing(names(r"\breport\(\)\.(\w+)"), {*dir(Report), *Report.__annotations__}.__contains__)


def test_named_settings_exist() -> None:
    def exists(name: str) -> bool:
        section: Any = FreezeConfig
        for part in name.split("."):
            if part not in getattr(section, "model_fields", {}):
                return False
            kinds = [section.model_fields[part].annotation, *getattr(section.model_fields[part].annotation, "__args__", ())]
            section = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
        return True

    assert not missing(names(r"^smartfrz\.(?!safetensors$)([a-z][\w.]*\w)$"), exists)


# ---- shell

COMMAND: Any = typer.main.get_command(app)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The `smartfrz` command of a line and what follows its name."""
    command = COMMAND
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command smartfrz {words[0]}: {sorted(command.commands)}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def check_command(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    if not words or words[0] in ("--version", "--help"):
        return
    command, rest = command_of(words)
    if hasattr(command, "commands"):
        return
    known = {name for option in command.params for name in option.opts} | {"--help"}
    for word in rest:
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"{line}: no option {word}, {sorted(known)}"


def test_named_commands_exist() -> None:
    lines = [(page, part) for page, text in TEXTS.items() for part in code(text) if re.match(r"smartfrz [a-z-]", part)]
    assert len(lines) > 30
    for page, line in lines:
        try:
            check_command(line)
        except AssertionError as error:
            raise AssertionError(f"{page}: {error}") from None


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda b: f"{b.page}:{b.line}")
def test_shell_blocks_parse(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda b: f"{b.page}:{b.line}")
def test_options_of_scripts_exist(block: Block) -> None:
    examples = "".join((ROOT / file).read_text() for file in FILES if re.match(r"launch/examples/.*\.py$", file))
    for script, rest in re.findall(r"(launch/examples/\w+\.py)([^#\n]*)", block.text):
        assert script in FILES
        for option in re.findall(r"--[\w-]+", rest):
            assert option in ("--deepspeed_config", "--help") or f'"{option}"' in examples, f"{script} has no {option}"


def test_every_block_has_a_known_language() -> None:
    assert {b.language for b in blocks()} == {"sh", "python", "json", "text"}


def test_the_planners_profile_is_a_profile(tmp_path: Path) -> None:
    (profile,) = [b.text for b in blocks("json", "docs/planning.md") if '"layers"' in b.text]
    (tmp_path / "costs.json").write_text(profile)
    arguments = [
        "plan",
        "--profile",
        str(tmp_path / "costs.json"),
        "--pp",
        "4",
        "--dp",
        "8",
        "--micro-batches",
        "16",
        "--frozen",
        "0.25,0.5,0.75",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output


def test_the_plugins_configuration_is_the_pages() -> None:
    (shown,) = [b.text for b in blocks("text", "docs/frameworks.md")]
    file = (ROOT / "configs/axolotl.yaml").read_text().splitlines(keepends=True)
    assert shown == "".join(line for line in file if not line.startswith("#"))


# ---- JSON


@pytest.mark.parametrize("block", [b for b in blocks("json") if '"layers": [\n' not in b.text], ids=lambda b: f"{b.page}:{b.line}")
def test_json_blocks_are_settings(block: Block) -> None:
    text = block.text if block.text.lstrip().startswith("{") else "{" + block.text + "}"
    config = json.loads(text)
    assert "smartfrz" in config
    FreezeConfig.load(config)


# ---- Python, in one process


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks_ = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(nn.Linear(8, 8), *blocks_, nn.Linear(8, 4))


def batches(first: int, last: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for number in range(first, last):
        torch.manual_seed(1000 + number)
        yield torch.randn(8, 8), torch.randint(4, (8,))


def python_blocks(page: str) -> list[Block]:
    return [b for b in blocks("python", page) if not b.not_run]


def test_every_python_block_is_run_or_says_why_not() -> None:
    pages = ("configuration", "planning", "monitoring", "predictor", "pytorch", "policies", "prefix-cache")
    here = {f"docs/{page}.md" for page in pages}
    elsewhere = {"README.md", "docs/adding-to-a-script.md", "docs/checkpoints.md", "docs/huggingface.md"}  # test_docs_run.py
    elsewhere |= {"docs/lightning.md"}  # test_lightning.py
    recipes = ("lora", "long-context", "vision-language", "rl", "continued-pretraining")  # test_recipes.py
    elsewhere |= {f"docs/{name}.md" for name in recipes}
    assert {b.page for b in blocks("python") if not b.not_run} == here | elsewhere


def test_python_blocks_of_settings_and_planning() -> None:
    for page in ("docs/configuration.md", "docs/planning.md"):
        for block in python_blocks(page):
            namespace: dict[str, Any] = {"smartfrz_ds": smartfrz_ds}
            block.run(namespace)
            if page.endswith("planning.md"):
                assert namespace["new"] == [0, 16, 22, 27, 32]  # as its comment says


def test_python_blocks_of_the_prefix_cache() -> None:
    loader, trainer = python_blocks("docs/prefix-cache.md")
    namespace: dict[str, Any] = {}
    loader.run(namespace)
    assert sorted(namespace["sampler"]) == list(range(100))
    trainer.run(namespace)
    own = namespace["HostTrainer"].__dict__["_get_train_sampler"]
    arguments = SimpleNamespace(seed=0, per_device_train_batch_size=10)
    assert sorted(own(SimpleNamespace(train_dataset=range(30), args=arguments))) == list(range(30))


def test_python_block_of_the_predictor_records_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks("docs/predictor.md")
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 100)
    names_ = {"loader": batches(0, 100), "held_out_inputs": torch.randn(8, 8), "accuracy": 0.5, "loss_of": nn.functional.cross_entropy}
    block.run({"model": model, "optimizer": optimizer, "scheduler": scheduler} | names_)
    assert (tmp_path / "recordings" / "runs" / "my-run.safetensors").is_file()


def test_python_block_of_a_policy_decides_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page says: named in the settings, from a module of the user's, and as an object; and it is as short as it looks."""
    (block,) = python_blocks("docs/policies.md")
    lines = [line for line in block.text.splitlines() if line.strip()]
    assert len(lines) <= 21
    (tmp_path / "my_policies.py").write_text(block.text)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace: dict[str, Any] = {}
    block.run(namespace)
    frozen = []
    for given in (
        {"config": {"policy": "my_policies:LowestChange", "policy_settings": {"share": 0.5}}},
        {"config": {}, "policy": namespace["LowestChange"](share=0.5)},
    ):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        quick = {"warmup_steps": 0, "freeze_interval": 1, "snapshot_interval": 1, "cooldown": 0, "total_steps": 20}
        controller = smartfrz_ds.attach_torch(model, optimizer, quick | given.pop("config"), **given)
        for x, y in batches(0, 8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        frozen.append([(event.step, event.layers) for event in controller.report().events])
        controller.detach()
    # the second snapshot is the first with a movement; two calm stages in a row freeze a layer
    assert frozen[0] == frozen[1] == [(step, (layer,)) for step, layer in zip((3, 5, 7), controller.layers, strict=False)]


class Run:
    """What a user's script around the blocks of docs/pytorch.md has, and the blocks themselves."""

    def __init__(self, **settings: Any) -> None:
        attach, self.loop, self.save, self.resume = python_blocks("docs/pytorch.md")
        self.names: dict[str, Any] = {"model": net(), "loss_of": nn.functional.cross_entropy}
        # A run of 24 steps, so that the learning rate moves in each of them.
        text = attach.text.replace("20_000", "24").replace('{"policy"', '{"snapshot_interval": 2, "freeze_interval": 2, "policy"')
        replace(attach, text=text).run(self.names)
        self.controller: TorchController = self.names["controller"]

    def train(self, first: int, last: int) -> None:
        self.loop.run(self.names | {"loader": batches(first, last)})

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.names["model"].parameters()]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("forgets_the_scheduler", [False, True])
def test_python_blocks_without_deepspeed_resume_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets_the_scheduler: bool
) -> None:
    """The run that docs/pytorch.md resumes equals one that never stopped; without the scheduler's line it does not."""
    monkeypatch.chdir(tmp_path)
    straight = Run()
    straight.train(0, 6)
    front = straight.controller.layers[:2]
    straight.controller.freeze(front)
    straight.train(6, 8)
    straight.save.run(straight.names)
    straight.train(8, 12)

    resumed = Run()
    lines = [line for line in resumed.resume.text.splitlines() if not (forgets_the_scheduler and "scheduler.load" in line)]
    replace(resumed.resume, text="\n".join(lines)).run(resumed.names)
    assert resumed.controller.frozen == front and resumed.controller.step == 8
    resumed.train(8, 12)
    equal = all(torch.equal(a, b) for a, b in zip(straight.weights(), resumed.weights(), strict=True))
    assert equal != forgets_the_scheduler
    assert (straight.names["scheduler"].get_last_lr() == resumed.names["scheduler"].get_last_lr()) != forgets_the_scheduler


def test_python_block_of_the_log_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = smartfrz_ds.attach_torch(
        model, optimizer, {"policy": "manual", "log_path": "freezing.jsonl", "status_interval": 2, "total_steps": 4}
    )
    for x, y in batches(0, 4):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        controller.observe(loss=loss.item())
        optimizer.step()
        optimizer.zero_grad()
    controller.freeze(controller.layers[:1])
    controller.release()
    (block,) = python_blocks("docs/monitoring.md")
    names_: dict[str, Any] = {}
    block.run(names_)
    assert [event.layers for event in names_["freezes"]] == [controller.layers[:1]]
    assert [step for step, _ in names_["losses"]] == [2, 4]
