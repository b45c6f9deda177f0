"""A new user's path through each door: an empty folder, the blocks of the page, and the few lines that only the user has.

`pytest -m slow tests/integrations/test_new_user.py -s` prints what was typed, what came out and how long it took: the table of
docs/index.md. Only the installation is not repeated: the packages are those of the test environment.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from docs_blocks import ROOT, blocks
from helpers import environment, free_port

pytestmark = pytest.mark.slow

SETTINGS = '{"policy": "linear", "linear": {"start_step": "20%", "end_step": "80%"}}'
MODEL = """
import torch
from torch import nn

import smartfrz_ds

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 16), *[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6)], nn.Linear(16, 4))
loader = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(60)]
loss_of = nn.functional.cross_entropy
"""


def python(page: str, number: int = 0) -> str:
    """The page's block that runs; the others say why they do not."""
    return [b for b in blocks("python", f"docs/{page}.md") if not b.not_run][number].text


def deepspeed_json(folder: Path, **others: object) -> None:
    ds = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}, "smartfrz": json.loads(SETTINGS) | others}
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    (folder / "ds_config.json").write_text(json.dumps(ds | {"optimizer": optimizer, "steps_per_print": 10**9}))


def deepspeed_script(folder: Path) -> str:
    deepspeed_json(folder, total_steps=60)
    parse = (
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--local_rank', type=int)\nargs = parser.parse_args()\n"
    )
    loop = "for x, y in batches:\n    engine.backward(loss_of(engine(x), y))\n    engine.step()\n"
    call = python("adding-to-a-script").replace("import smartfrz_ds", "params, batches = model.parameters(), loader")
    (folder / "train.py").write_text(MODEL + parse + call + loop)
    return f"deepspeed --master_port {free_port()} --num_accelerators 2 train.py"


def trainer_script(folder: Path) -> str:
    deepspeed_json(folder)
    (folder / "ds_config.json").rename(folder / "ds.json")
    start = (
        "import torch\nfrom transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments\n"
        "import smartfrz_ds\n"
        "sizes = dict(hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32)\n"
        "model = BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))\n"
        "data = [{'input_ids': torch.randint(1, 40, (8,)), 'labels': i % 2} for i in range(64)]\n"
    )
    # The JSON's batch and rate are the user's own, and so is the length; a CPU must be asked for.
    short = "max_steps=60, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[], use_cpu=True"
    (folder / "train.py").write_text(start + python("huggingface").replace("max_steps=1000", short))
    return f"deepspeed --master_port {free_port()} --num_accelerators 2 train.py"


def fsdp_script(folder: Path) -> str:
    shard = (
        "import torch.distributed as dist\nfrom torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.fsdp import fully_shard\n"
        "dist.init_process_group('gloo')\nmesh = init_device_mesh('cpu', (dist.get_world_size(),))\n"
        "for part in model:\n    fully_shard(part, mesh=mesh)\nfully_shard(model, mesh=mesh)\n"
    )
    attach = python("pytorch").replace("20_000", "60").replace('{"policy": "attention"', SETTINGS[:-1])
    (folder / "train.py").write_text(MODEL + shard + attach + python("pytorch", 1) + "controller.detach()\ndist.destroy_process_group()\n")
    return f"torchrun --master_port {free_port()} --nproc_per_node 2 train.py"


def lightning_script(folder: Path) -> str:
    pytest.importorskip("lightning")
    module = (
        "from lightning.pytorch import LightningModule, Trainer\n"
        "class Module(LightningModule):\n"
        "    def __init__(self):\n        super().__init__()\n        self.net = model\n"
        "    def training_step(self, batch, _):\n        return loss_of(self.net(batch[0]), batch[1])\n"
        "    def configure_optimizers(self):\n        return torch.optim.AdamW(self.parameters(), lr=1e-3)\n"
    )
    door = python("lightning").replace("deepspeed_stage_2", "auto").replace("trainer.fit(model,", "trainer.fit(Module(),")
    door = door.replace("max_epochs=2,", 'max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,')
    batches = "loader = torch.utils.data.DataLoader(loader, batch_size=None)\n"  # Lightning takes a list for several loaders
    (folder / "train.py").write_text(MODEL + module + batches + door)
    return "python train.py"


def own_policy_script(folder: Path) -> str:
    (folder / "my_policies.py").write_text(python("policies"))
    own = '{"policy": "my_policies:LowestChange", "policy_settings": {"share": 0.5}'
    attach = python("pytorch").replace("20_000", "60").replace('{"policy": "attention"', own)
    (folder / "train.py").write_text(MODEL + attach + python("pytorch", 1) + "controller.detach()\n")
    return "python train.py"


def planning(folder: Path) -> str:
    lines = [line for b in blocks("sh", "docs/planning.md") for line in b.text.splitlines()]
    return next(line for line in lines if line.startswith("smartfrz plan --layers")).partition("   #")[0]


@pytest.mark.parametrize(
    ("door", "expected"),
    [
        (deepspeed_script, r"end at step 60.*: froze .* layers frozen now"),
        (trainer_script, r"end at step 60.*: froze .* layers frozen now"),
        (fsdp_script, r"end at step 60.*: froze .* layers frozen now"),
        (lightning_script, r"end at step 120.*: froze .* layers frozen now"),
        (own_policy_script, r"end at step 60.*: froze .* layers frozen now"),
        (planning, r"^ *\d+% +\d+ .*x .*"),
    ],
)
def test_door(door: Callable[[Path], str], expected: str, tmp_path: Path) -> None:
    command = door(tmp_path)
    surroundings = environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    if command.startswith("smartfrz"):
        command = command.replace("smartfrz", 'python -c "from smartfrz_ds.cli.main import app; app()"', 1)
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stdout[-3000:]
    found = re.findall(expected, done.stdout, re.MULTILINE)
    assert found, done.stdout[-3000:]
    print(f"\n| {door.__name__} | `{command}` | {found[-1]} | {seconds:.0f} s |")
