"""`smartfrz doctor`: looks for what stops a run, or makes it hang, before it is started. This machine here; settings and model in
doctor_config.py.

Every finding that is not fine has an answer: what to do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from smartfrz_ds.integrations import build_locks

from .findings import Finding

if TYPE_CHECKING:
    from .doctor_config import LayerFacts

_SHM_BYTES = 256 * 2**20  # DeepSpeed's CPU communication op takes 69 MB a rank
_OPEN_FILES = 1024
_DEFAULT_PORT = 29500  # deepspeed/constants.py: TORCH_DISTRIBUTED_DEFAULT_PORT


@dataclass(frozen=True)
class Examined:
    """findings: of machine, settings and model, in the order of looking. layers: the model's table, front to back; () without a model."""

    findings: tuple[Finding, ...]
    layers: tuple[LayerFacts, ...] = ()

    @property
    def exit_code(self) -> int:
        """1 where there is a problem, else 0."""
        return int(any(f.level == "problem" for f in self.findings))

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {"findings": [f.to_json() for f in self.findings], "layers": [layer.to_json() for layer in self.layers]}


def examine(config: Path | None = None, model: str | None = None) -> Examined:
    """Look at the machine, and at a DeepSpeed JSON and a model (see `load_model`) where they are given."""
    findings = examine_machine()
    layers: list[LayerFacts] = []
    if config is None and model is None:
        return Examined(tuple(findings))
    with contextlib.redirect_stdout(sys.stderr):  # what somebody's model prints is no part of ours
        from .doctor_config import check_config, check_model, load_model
        from .doctor_refusals import check_together

        settings = None
        if config is not None:
            found, settings = check_config(config)
            findings += found
        if model is not None:
            try:
                made = load_model(model)
                found, layers = check_model(*made, settings)
                found += check_together(made[0], config) if settings is not None else []
            except ValueError as error:
                answer = "name MODULE:CALLABLE, importable from here, or a folder written by save_pretrained"
                found = [Finding("model", "problem", str(error), answer)]
            findings += found
    return Examined(tuple(findings), tuple(layers))


def render(examined: Examined, width: int = 110) -> str:
    """The findings for people: one a line, the answer below it; the model's table; the sum."""
    marks = {"ok": "ok     ", "warning": "WARNING", "problem": "PROBLEM"}
    lines = []
    for f in examined.findings:
        lines += textwrap.wrap(f"{f.check}: {f.text}", width, initial_indent=f"{marks[f.level]} ", subsequent_indent=" " * 8)
        if f.answer:
            lines += textwrap.wrap(f"-> {f.answer}", width, initial_indent=" " * 8, subsequent_indent=" " * 11, break_long_words=False)
    if examined.layers:
        lines += ["", *_layer_table(examined.layers)]
    levels = [f.level for f in examined.findings]
    problems, warned = levels.count("problem"), levels.count("warning")
    lines += ["", f"{problems} problem{'s' * (problems != 1)}, {warned} warning{'s' * (warned != 1)}"]
    return "\n".join(lines)


def _layer_table(layers: Sequence[LayerFacts]) -> list[str]:
    rows = [("", "layer", "weights", "forward", "saved", "can freeze")]
    for x in layers:
        can = ("yes" if x.freezable else "no") + (f": {x.reason}" if x.reason else "")
        rows.append(
            (str(x.position), x.name, f"{x.weights:,}", f"{100 * x.forward:.1f} %", f"{100 * x.saved:.1f} %" if x.freezable else "", can)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for a, name, *numbers, can in rows:
        cells = [f"{number:>{w}}" for number, w in zip(numbers, widths[2:], strict=True)]
        lines.append(f"{a:>{widths[0]}}  {name:<{widths[1]}}  {'  '.join(cells)}  {can}")
    about = "forward: share of the forward's FLOPs; saved: share of a training step's while this layer and all in front of it are frozen"
    return [*lines, f"({about})"]


def examine_machine() -> list[Finding]:
    """All checks of this machine and this environment. Takes some seconds; starts no ranks, changes nothing."""
    return [
        *check_versions(),
        *check_compiler(),
        *check_build_locks(),
        *check_mpi(),
        *check_host(),
        *check_port(),
        *check_shm(),
        *check_limits(),
    ]


# --- packages --------------------------------------------------------------------------------------------------------------------


def check_versions() -> list[Finding]:
    """Python, torch, DeepSpeed, and transformers and accelerate where they are installed."""
    found = [Finding("python", "ok", f"Python {sys.version.split()[0]}")]  # an older one doesn't get here
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed talks while it is imported
            import deepspeed
            import torch

            from smartfrz_ds.backends.deepspeed.compat import TESTED_DEEPSPEED, check_version
            from smartfrz_ds.backends.torch.compat import check_torch
    except Exception as error:
        text = f"torch or DeepSpeed can't be imported: {type(error).__name__}: {error}"
        return [*found, Finding("deepspeed", "problem", text, "install both: pip install 'smartfrz_ds'")]
    found += [_torch(torch)]
    try:
        check_torch(allow_untested=False)
    except ValueError as error:
        found.append(Finding("torch", "warning", str(error).split(". Install")[0], "only attach_torch (DDP, FSDP) refuses it; see there"))
    try:
        check_version(allow_untested=False)
        found.append(Finding("deepspeed", "ok", f"DeepSpeed {deepspeed.__version__}"))
    except ValueError:
        answer = f"pip install 'deepspeed{TESTED_DEEPSPEED}'; or set smartfrz.allow_untested_versions to true to try all the same"
        text = f"DeepSpeed {deepspeed.__version__} is not among the tested versions ({TESTED_DEEPSPEED}): it is refused at start"
        found.append(Finding("deepspeed", "problem", text, answer))
    return found + check_packages(["transformers", "accelerate"])


def _torch(torch: Any) -> Finding:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if not torch.version.cuda:
        if shutil.which("nvidia-smi"):
            answer = "install torch's CUDA build (pytorch.org says how), or set DS_ACCELERATOR=cpu if you mean it"
            return Finding("torch", "problem", f"torch {torch.__version__} ({build}) on a machine with an NVIDIA driver", answer)
        return Finding("torch", "ok", f"torch {torch.__version__} ({build}): ranks run on the CPU, over gloo")
    count = torch.cuda.device_count()
    if count:
        return Finding("torch", "ok", f"torch {torch.__version__} ({build}), {count} GPU{'s' * (count > 1)}")
    answer = "set DS_ACCELERATOR=cpu to train on the CPU; else look at the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    return Finding("torch", "warning", f"torch {torch.__version__} ({build}) sees no GPU", answer)


def check_packages(names: Iterable[str]) -> list[Finding]:
    """Optional packages against what this package's extras ask for."""
    wanted = {r.name: r.specifier for r in map(Requirement, requires("smartfrz_ds") or ()) if r.marker is not None}
    found = []
    for name in names:
        try:
            have = version(name)
        except PackageNotFoundError:
            found.append(Finding(name, "ok", f"{name} is not installed: needed only for the Hugging Face Trainer and Accelerate"))
            continue
        if wanted[name].contains(have, prereleases=True):
            found.append(Finding(name, "ok", f"{name} {have}"))
        else:
            text = f"{name} {have} was not tried with this package (tried: {wanted[name]})"
            found.append(Finding(name, "warning", text, f"pip install '{name}{wanted[name]}'"))
    return found


# --- building DeepSpeed's ops ----------------------------------------------------------------------------------------------------


def check_compiler() -> list[Finding]:
    """What DeepSpeed needs to build its ops at the first start: a C++ compiler, Python's headers, one ninja."""
    found = []
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler):
        found.append(Finding("compiler", "ok", f"C++ compiler {shutil.which(compiler)}"))
    else:
        text = f"no C++ compiler ({compiler}): DeepSpeed can't build its ops"
        found.append(Finding("compiler", "problem", text, "install one, for example the package g++, or name yours: CXX=/path/to/c++"))
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        text = "Python's headers (Python.h) are missing: DeepSpeed can't build its ops"
        found.append(Finding("compiler", "problem", text, "install them, for example the package python3-dev"))
    return [*found, _ninja()]


def _ninja() -> Finding:
    first = shutil.which("ninja")
    if first is None:
        return Finding(
            "ninja", "problem", "no ninja on PATH: DeepSpeed can't build its ops", "pip install ninja, and activate the environment"
        )
    own = Path(sys.executable).with_name("ninja")
    versions = {path: _output(str(path), "--version") for path in {Path(first), own} if path.exists()}
    if len(set(versions.values())) > 1:
        listed = ", ".join(f"{path} is {number or 'broken'}" for path, number in sorted(versions.items()))
        text = f"two ninja versions ({listed}): they don't read each other's logs, and rebuild DeepSpeed's ops in turns"
        return Finding("ninja", "warning", text, f"use the environment's everywhere: PATH={own.parent}:$PATH")
    return Finding("ninja", "ok", f"ninja {versions[Path(first)]}")


def _output(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def check_build_locks(folder: Path | None = None) -> list[Finding]:
    """Locks under which torch builds extensions (build_locks.py): a rank waits for each that is there, silently.

    folder: default: TORCH_EXTENSIONS_DIR, else torch's own place.
    """
    folder = build_locks.extensions_folder() if folder is None else folder
    found = []
    for lock in build_locks.find(folder):
        if lock.state == "built":
            found.append(Finding("build locks", "warning", str(lock), lock.answer))
        elif lock.state == "orphaned":
            found.append(Finding("build locks", "warning", str(lock), "a start waits until that has ended, and removes the lock"))
        elif lock.state == "abandoned":
            text = f"{lock}. A build that was killed left it: smartfrz_ds removes it at its next start, any other program waits for it"
            found.append(Finding("build locks", "problem", text, lock.answer))
        else:
            found.append(Finding("build locks", "problem", f"{lock}. If its build was killed, every start waits for it", lock.answer))
    return found or [Finding("build locks", "ok", f"no build lock in {folder}")]


# --- launching -------------------------------------------------------------------------------------------------------------------


def check_mpi() -> list[Finding]:
    """mpirun and mpi4py: both or neither."""
    mpirun, mpi4py = shutil.which("mpirun"), importlib.util.find_spec("mpi4py") is not None
    if not mpirun and not mpi4py:
        return [Finding("mpi", "ok", "no MPI: needed only for mpirun and --launcher openmpi (pip install 'smartfrz_ds[mpi]')")]
    if not mpi4py:
        text = f"{mpirun} is there, but mpi4py is not: a plain mpirun start can't find its ranks"
        return [Finding("mpi", "warning", text, "pip install mpi4py, or start with deepspeed or torchrun")]
    code = "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        answer = "install an MPI library that fits (pip install 'smartfrz_ds[mpi]'), or build mpi4py against yours"
        return [Finding("mpi", "problem", f"mpi4py finds no MPI library: {why}", answer)]
    if not mpirun:
        own = Path(sys.executable).with_name("mpirun")
        answer = f"use the environment's: PATH={own.parent}:$PATH" if own.exists() else "put your MPI's bin folder on PATH"
        return [Finding("mpi", "warning", f"mpi4py works ({done.stdout.strip()}), but there is no mpirun on PATH", answer)]
    return [Finding("mpi", "ok", f"{mpirun}, {done.stdout.strip()}")]


def check_host(name: str | None = None) -> list[Finding]:
    """Whether this host's name leads other hosts to it. name: default: this host's."""
    name = name or socket.gethostname()
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface:
        if interface in {known for _, known in socket.if_nameindex()}:
            return [Finding("host name", "ok", f"GLOO_SOCKET_IFNAME={interface}: gloo uses that interface")]
        known = ", ".join(n for _, n in socket.if_nameindex())
        text = f"GLOO_SOCKET_IFNAME={interface}, but there is no such interface"
        return [Finding("host name", "problem", text, f"name one of: {known}")]
    try:
        addresses = list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)))
    except OSError as error:
        answer = f"add a line with this host's address and name to /etc/hosts: ADDRESS {name}"
        return [Finding("host name", "problem", f"the host name {name!r} can't be resolved ({error}): gloo ends with an error", answer)]
    if addresses[0].startswith("127.") or addresses[0] == "::1":
        text = (
            f"the host name {name!r} means {addresses[0]} here: on one node that is fine; between nodes gloo would listen where nobody "
            'else can connect ("connectFullMesh failed … Connection refused")'
        )
        answer = f"several nodes: map the name to the node's own address in /etc/hosts, or set GLOO_SOCKET_IFNAME ({_interfaces()})"
        return [Finding("host name", "warning", text, answer)]
    return [Finding("host name", "ok", f"the host name {name!r} means {addresses[0]}")]


def _interfaces() -> str:
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    return f"one of {', '.join(names)}" if names else "there is none here but lo"


def check_port(port: int | None = None) -> list[Finding]:
    """Whether ports can be bound, and the launcher's is free. port: default: MASTER_PORT, else DeepSpeed's."""
    with socket.socket() as any_port:
        try:
            any_port.bind(("127.0.0.1", 0))
        except OSError as error:
            text = f"no port of 127.0.0.1 can be bound ({error}): ranks can't meet"
            return [Finding("port", "problem", text, "bring the loopback interface up: ip link set lo up")]
    asked = os.environ.get("MASTER_PORT", str(_DEFAULT_PORT))
    if port is None and not (asked.isdigit() and 0 < int(asked) < 65536):
        return [Finding("port", "problem", f"MASTER_PORT is {asked!r}", "set a number from 1 to 65535, or unset it")]
    port = int(asked) if port is None else port
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError as error:
            answer = "deepspeed --master_port PORT with a free one; torchrun --standalone looks for one itself"
            return [Finding("port", "warning", f"port {port}, the launcher's, can't be used ({error.strerror})", answer)]
    return [Finding("port", "ok", f"port {port} is free")]


# --- the system ------------------------------------------------------------------------------------------------------------------


def check_shm(folder: Path = Path("/dev/shm"), needed: int = _SHM_BYTES) -> list[Finding]:
    """Shared memory: room for DeepSpeed's CPU op, and what ended runs left there. needed: bytes that should be free."""
    if not folder.is_dir():
        return [Finding("shared memory", "warning", f"no {folder}", "mount it: DeepSpeed's CPU op and data loaders' workers need it")]
    found = []
    mapped = _mapped()
    left = [path for path in sorted(folder.glob("deepspeed_*")) if str(path) not in mapped]
    size = sum(path.stat().st_size for path in left)
    if left:
        text = f"{len(left)} files of runs that have ended hold {size / 1e6:.0f} MB in {folder}"
        jobs = dict.fromkeys(re.sub(r"_\d+$", "_*", str(path)) for path in left)  # of each job's ranks one name
        found.append(Finding("shared memory", "warning", text, "remove them: rm " + " ".join(jobs)))
    free = shutil.disk_usage(folder).free
    if free < needed:
        text = f"{free / 1e6:.0f} MB free in {folder}; DeepSpeed's CPU op takes 69 MB a rank, and a rank that gets none dies of SIGBUS"
        found.append(Finding("shared memory", "problem", text, "make room, or give a container more: docker run --shm-size=8g"))
    return found or [Finding("shared memory", "ok", f"{free / 1e9:.1f} GB free in {folder}")]


def _mapped() -> set[str]:
    """Files that some process of ours has mapped."""
    paths: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            paths.update(re.findall(r"(/\S*deepspeed_\S+)", maps.read_text()))
    return paths


def check_limits() -> list[Finding]:
    """Open files: each rank holds sockets to all others, each data loader's worker some more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        text = f"a process may open {soft} files (ulimit -n): many ranks or data loader workers end in 'Too many open files'"
        return [Finding("open files", "warning", text, f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")]
    return [Finding("open files", "ok", f"a process may open {'any number of' if soft == resource.RLIM_INFINITY else soft} files")]
