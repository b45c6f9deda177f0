"""A run without DeepSpeed does not pay for its import: seconds, and the build of an operator on a new machine."""

from __future__ import annotations

import os
import subprocess
import sys

# One process for all, since each imports torch. The process group is there because its timeout and the collectives' device are looked up
# in another way where DeepSpeed is not loaded.
RUN = """
import sys, torch, torch.distributed as dist

def loaded():
    return [m for m in sys.modules if m.split(".")[0] in ("deepspeed", "lightning", "pytorch_lightning")]

import smartfrz_ds
smartfrz_ds.attach_torch, smartfrz_ds.TorchController, smartfrz_ds.FreezeConfig, smartfrz_ds.read_events, smartfrz_ds.explained
assert not loaded(), f"attach_torch: {loaded()[:3]}"
import smartfrz_ds.predictor, smartfrz_ds.policies, smartfrz_ds.planner
assert not loaded(), f"predictor, policies, planner: {loaded()[:3]}"

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
optimizer = torch.optim.AdamW(model.parameters())
controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "total_steps": 10})
for step in range(4):
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    if step == 1:
        before = model[0].weight.clone()
        assert controller.predict_pause(controller.layers[:1]).seconds >= 0
        controller.freeze(controller.layers[:1])
assert torch.equal(model[0].weight, before) and len(controller.frozen) == 1
controller.release()
dist.destroy_process_group()
assert not loaded(), f"a run: {loaded()[:3]}"
"""


def test_deepspeed_is_not_imported_where_it_is_not_used() -> None:
    done = subprocess.run([sys.executable, "-c", RUN], env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
