"""The self-check: whether freezing is right with a DeepSpeed or torch that nobody has tested.

A toy model trains on this kind of engine with these options, in two processes on the CPU: freeze, step, save, thaw, load. One process with
plain torch does the same, and the weights are compared after each step. Rank 0 of the run starts it and tells the others; nothing of it
stays in the run's process, as DeepSpeed keeps process groups in globals.

  case.py        what is checked: the engine's kind and the options that the backends branch on
  verdict.py     the three verdicts, and their cache on disk
  start.py       the processes, their environment and their time limit
  toy.py         what the processes do, and the comparison
  plain.py       the toy model, and one process with plain torch
  engines.py     the toy on a DeepSpeed engine; wrappers.py: in DDP, FSDP1 or FSDP2
"""

from __future__ import annotations

from .judge import judge as judge
from .verdict import Verdict as Verdict
