"""`smartfrz doctor`: looks for problems that would stop a run or make it hang, before it is started.

The machine is checked here, settings and model in doctor_config.py. Every finding other than "ok" has an answer: what to do.
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from smartfrz_ds.config.reading import read_config
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.integrations import build_locks

from .findings import Finding

if TYPE_CHECKING:
    from .doctor_config import LayerFacts

_SHM_BYTES = 256 * 2**20  # DeepSpeed's CPU communication op takes 69 MB per rank
_OPEN_FILES = 1024
_SHOWN = 3  # items of a list that is shown in part
_DEFAULT_PORT = 29500  # deepspeed/constants.py: TORCH_DISTRIBUTED_DEFAULT_PORT


@dataclass(frozen=True)
class Examined:
    """The result of an examination.

    Attributes:
        findings: Of machine, settings and model, in the order of the checks.
        layers: The model's layers, front to back; () without a model.
    """

    findings: tuple[Finding, ...]
    layers: tuple[LayerFacts, ...] = ()

    @property
    def exit_code(self) -> int:
        """1 if there is a problem, else 0."""
        return int(any(f.level == "problem" for f in self.findings))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serializable dict."""
        return {"findings": [f.to_json() for f in self.findings], "layers": [layer.to_json() for layer in self.layers]}


def examine(config: Path | None = None, model: str | None = None, *, self_check: bool = False) -> Examined:
    """Examine the machine and, if given, a DeepSpeed JSON and a model.

    Args:
        config: A DeepSpeed JSON.
        model: As in `load_model`.
        self_check: Whether to run the self-check of the installed versions, which starts ranks and takes some seconds.
    """
    findings = [*check_versions(*_readable(config), run=self_check), *examine_machine()]
    layers: list[LayerFacts] = []
    if config is None and model is None:
        return Examined(tuple(findings))
    with contextlib.redirect_stdout(sys.stderr):  # the output of the user's model is not part of the result
        from .doctor_cache import check_cache
        from .doctor_config import check_config, check_model
        from .doctor_load import NotBuilt, load_model
        from .doctor_refusals import check_together

        settings = None
        if config is not None:
            found, settings = check_config(config)
            findings += found
        if model is not None:
            try:
                made = load_model(model)
                found, layers = check_model(*made, settings)
                if settings is not None:
                    found += [*check_together(made[0], config), *check_cache(*made, settings, layers)]
            except NotBuilt as error:
                found = [Finding("model", "problem", str(error), error.remedy)]
            findings += found
    return Examined(tuple(findings), tuple(layers))


def _readable(config: Path | None) -> tuple[Mapping[str, Any] | None, FreezeConfig | None]:
    """Return the content of a DeepSpeed JSON and its settings, for the check of versions; None for what `check_config` will refuse."""
    with contextlib.suppress(ValueError):
        if config is not None:
            return read_config(config)[0], FreezeConfig.load(config)
    return None, None


def render(examined: Examined, width: int = 110) -> str:
    """Format the findings as text, problems first, each with its answer below it, then the model's layers and a summary line."""
    marks = {"ok": "ok     ", "warning": "WARNING", "problem": "PROBLEM"}
    lines = []
    for f in sorted(examined.findings, key=lambda f: ("problem", "warning", "ok").index(f.level)):
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
    for position, name, *numbers, can in rows:
        cells = [f"{number:>{w}}" for number, w in zip(numbers, widths[2:], strict=True)]
        lines.append(f"{position:>{widths[0]}}  {name:<{widths[1]}}  {'  '.join(cells)}  {can}")
    about = "forward: share of the forward's FLOPs; saved: share of a step's FLOPs that freezing it and all before it saves"
    return [*lines, f"({about})"]


def examine_machine() -> list[Finding]:
    """Run all checks of this machine and environment. Takes a few seconds, starts no ranks and changes nothing."""
    return [
        *check_compiler(),
        *check_build_locks(),
        *check_mpi(),
        *check_host(),
        *check_port(),
        *check_shm(),
        *check_limits(),
    ]


# --- packages --------------------------------------------------------------------------------------------------------------------


def check_versions(raw: Mapping[str, Any] | None = None, settings: FreezeConfig | None = None, *, run: bool = False) -> list[Finding]:
    """Check Python, torch and DeepSpeed, and transformers and accelerate if they are installed. Arguments as in `check_verdicts`."""
    found = [Finding("python", "ok", f"Python {sys.version.split()[0]}")]  # an older one cannot import this file
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints while it is imported
            import deepspeed  # noqa: F401
            import torch

            from .doctor_versions import check_verdicts
    except Exception as error:
        text = f"torch or DeepSpeed cannot be imported: {type(error).__name__}: {error}"
        return [*found, Finding("deepspeed", "problem", text, "install both: pip install 'smartfrz_ds'")]
    found += [_torch(torch), *check_verdicts(raw, settings, run=run)]
    return found + check_packages(["transformers", "accelerate"])


def _torch(torch: Any) -> Finding:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if not torch.version.cuda:
        if shutil.which("nvidia-smi"):
            answer = "install torch's CUDA build (see pytorch.org), or set DS_ACCELERATOR=cpu to train on the CPU"
            return Finding("torch", "problem", f"torch {torch.__version__} ({build}) on a machine with an NVIDIA driver", answer)
        return Finding("torch", "ok", f"torch {torch.__version__} ({build}): ranks run on the CPU, over gloo")
    count = torch.cuda.device_count()
    if count:
        return Finding("torch", "ok", f"torch {torch.__version__} ({build}), {count} GPU{'s' * (count > 1)}")
    answer = "set DS_ACCELERATOR=cpu to train on the CPU; otherwise check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    return Finding("torch", "warning", f"torch {torch.__version__} ({build}) sees no GPU", answer)


def check_packages(names: Iterable[str]) -> list[Finding]:
    """Compare optional packages with the versions that this package's extras require."""
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
            text = f"{name} {have} was not tested with this package (tested: {wanted[name]})"
            found.append(Finding(name, "warning", text, f"pip install '{name}{wanted[name]}'"))
    return found


# --- building DeepSpeed's ops ----------------------------------------------------------------------------------------------------


def check_compiler() -> list[Finding]:
    """Check the tools with which DeepSpeed builds its ops at the first start: a C++ compiler, Python's headers, one ninja."""
    found = []
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler):
        found.append(Finding("compiler", "ok", f"C++ compiler {shutil.which(compiler)}"))
    else:
        text = f"no C++ compiler ({compiler}): DeepSpeed cannot build its ops"
        found.append(Finding("compiler", "problem", text, "install one, for example the package g++, or set CXX=/path/to/c++"))
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        text = "Python's headers (Python.h) are missing: DeepSpeed cannot build its ops"
        found.append(Finding("compiler", "problem", text, "install them, for example the package python3-dev"))
    return [*found, _ninja()]


def _ninja() -> Finding:
    first = shutil.which("ninja")
    if first is None:
        return Finding(
            "ninja", "problem", "no ninja on PATH: DeepSpeed cannot build its ops", "pip install ninja, and activate the environment"
        )
    own = Path(sys.executable).with_name("ninja")
    versions = {path: _output(str(path), "--version") for path in {Path(first), own} if path.exists()}
    if len(set(versions.values())) > 1:
        listed = ", ".join(f"{path} is {number or 'broken'}" for path, number in sorted(versions.items()))
        text = f"two ninja versions ({listed}): they cannot read each other's logs and rebuild DeepSpeed's ops alternately"
        return Finding("ninja", "warning", text, f"use only the environment's: PATH={own.parent}:$PATH")
    return Finding("ninja", "ok", f"ninja {versions[Path(first)]}")


def _output(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def check_build_locks(folder: Path | None = None) -> list[Finding]:
    """Check torch's build locks (build_locks.py), for which a rank waits silently.

    Args:
        folder: Default: TORCH_EXTENSIONS_DIR, else torch's default.
    """
    folder = build_locks.extensions_folder() if folder is None else folder
    found = []
    for lock in build_locks.find(folder):
        if lock.state == "built":
            found.append(Finding("build locks", "warning", str(lock), lock.answer))
        elif lock.state == "orphaned":
            found.append(
                Finding("build locks", "warning", str(lock), "the next start waits until that process has ended, then removes the lock")
            )
        elif lock.state == "abandoned":
            text = f"{lock}. A killed build left it: smartfrz_ds removes it at its next start, any other program waits for it"
            found.append(Finding("build locks", "problem", text, lock.answer))
        else:
            found.append(Finding("build locks", "problem", f"{lock}. If its build was killed, every later start waits for it", lock.answer))
    return found or [Finding("build locks", "ok", f"no build lock in {folder}")]


# --- launching -------------------------------------------------------------------------------------------------------------------


def check_mpi() -> list[Finding]:
    """Check that mpirun and mpi4py are both installed, or neither."""
    mpirun, mpi4py = shutil.which("mpirun"), importlib.util.find_spec("mpi4py") is not None
    if not mpirun and not mpi4py:
        return [Finding("mpi", "ok", "no MPI: needed only for mpirun and --launcher openmpi (pip install 'smartfrz_ds[mpi]')")]
    if not mpi4py:
        text = f"{mpirun} is installed, but mpi4py is not: ranks started by mpirun cannot find each other"
        return [Finding("mpi", "warning", text, "pip install mpi4py, or start with deepspeed or torchrun")]
    code = "from mpi4py import MPI; print(MPI.Get_library_version().split(',')[0].splitlines()[0].rstrip(chr(0)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        answer = "install a matching MPI library (pip install 'smartfrz_ds[mpi]'), or build mpi4py against yours"
        return [Finding("mpi", "problem", f"mpi4py cannot load an MPI library: {why}", answer)]
    if not mpirun:
        own = Path(sys.executable).with_name("mpirun")
        answer = f"use the environment's mpirun: PATH={own.parent}:$PATH" if own.exists() else "add your MPI's bin folder to PATH"
        return [Finding("mpi", "warning", f"mpi4py works ({done.stdout.strip()}), but there is no mpirun on PATH", answer)]
    return [Finding("mpi", "ok", f"{mpirun}, {done.stdout.strip()}")]


def check_host(name: str | None = None) -> list[Finding]:
    """Check that other hosts can reach this one by its name.

    Args:
        name: Default: this host's name.
    """
    name = name or socket.gethostname()
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface:
        if interface in {known for _, known in socket.if_nameindex()}:
            return [Finding("host name", "ok", f"GLOO_SOCKET_IFNAME={interface}: gloo uses that interface")]
        known = ", ".join(n for _, n in socket.if_nameindex())
        text = f"GLOO_SOCKET_IFNAME={interface}, but this host has no such interface"
        return [Finding("host name", "problem", text, f"set it to one of: {known}")]
    try:
        addresses = list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)))
    except OSError as error:
        answer = f"add a line with this host's address and name to /etc/hosts: ADDRESS {name}"
        return [Finding("host name", "problem", f"the host name {name!r} cannot be resolved ({error}): gloo fails", answer)]
    if addresses[0].startswith("127.") or addresses[0] == "::1":
        text = (
            f"the host name {name!r} resolves to {addresses[0]}: this is fine on one node; with several, gloo would listen where other "
            'nodes cannot connect ("connectFullMesh failed … Connection refused")'
        )
        answer = f"for several nodes: map the name to the node's own address in /etc/hosts, or set GLOO_SOCKET_IFNAME ({_interfaces()})"
        return [Finding("host name", "warning", text, answer)]
    return [Finding("host name", "ok", f"the host name {name!r} resolves to {addresses[0]}")]


def _interfaces() -> str:
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    return f"one of {', '.join(names)}" if names else "this host has only lo"


def check_port(port: int | None = None) -> list[Finding]:
    """Check that ports can be bound and that the launcher's is free.

    Args:
        port: Default: MASTER_PORT, else DeepSpeed's default.
    """
    with socket.socket() as any_port:
        try:
            any_port.bind(("127.0.0.1", 0))
        except OSError as error:
            text = f"no port of 127.0.0.1 can be bound ({error}): ranks cannot connect"
            return [Finding("port", "problem", text, "bring the loopback interface up: ip link set lo up")]
    asked = os.environ.get("MASTER_PORT", str(_DEFAULT_PORT))
    if port is None and not (asked.isdigit() and 0 < int(asked) < 65536):
        return [Finding("port", "problem", f"MASTER_PORT is {asked!r}", "set it to a number from 1 to 65535, or unset it")]
    port = int(asked) if port is None else port
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError as error:
            answer = "pass a free port: deepspeed --master_port PORT; torchrun --standalone finds one itself"
            return [Finding("port", "warning", f"the launcher's port {port} cannot be used ({error.strerror})", answer)]
    return [Finding("port", "ok", f"port {port} is free")]


# --- the system ------------------------------------------------------------------------------------------------------------------


def check_shm(folder: Path = Path("/dev/shm"), needed: int = _SHM_BYTES) -> list[Finding]:
    """Check shared memory: space for DeepSpeed's CPU op, and files left by ended runs.

    Args:
        folder: Where shared memory is mounted.
        needed: Bytes that should be free.
    """
    if not folder.is_dir():
        return [
            Finding("shared memory", "warning", f"{folder} does not exist", "mount it: DeepSpeed's CPU op and data loader workers need it")
        ]
    found = []
    mapped = _mapped()
    left = [path for path in sorted(folder.glob("deepspeed_*")) if str(path) not in mapped]
    size = sum(path.stat().st_size for path in left)
    if left:
        text = f"{len(left)} files of ended runs occupy {size / 1e6:.0f} MB in {folder}"
        jobs = list(dict.fromkeys(re.sub(r"_\d+$", "_*", str(path)) for path in left))  # one pattern for all ranks of a job
        if len(jobs) > _SHOWN and not any(Path(path).parent == folder for path in mapped):
            jobs = [f"{folder}/deepspeed_*"]  # no running job has any
        more = f" (then start the doctor again: {len(jobs) - _SHOWN} more jobs have some)" if len(jobs) > _SHOWN else ""
        found.append(Finding("shared memory", "warning", text, f"remove them: rm {' '.join(jobs[:_SHOWN])}{more}"))
    free = shutil.disk_usage(folder).free
    if free < needed:
        text = f"{free / 1e6:.0f} MB free in {folder}; DeepSpeed's CPU op takes 69 MB per rank, and a rank without it dies of SIGBUS"
        found.append(Finding("shared memory", "problem", text, "free some, or give the container more: docker run --shm-size=8g"))
    return found or [Finding("shared memory", "ok", f"{free / 1e9:.1f} GB free in {folder}")]


def _mapped() -> set[str]:
    """DeepSpeed's shared-memory files that a running process has mapped."""
    paths: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            paths.update(re.findall(r"(/\S*deepspeed_\S+)", maps.read_text()))
    return paths


def check_limits() -> list[Finding]:
    """Check the limit on open files: each rank has sockets to all others, and each data loader worker needs some more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        text = f"a process may open {soft} files (ulimit -n): many ranks or data loader workers fail with 'Too many open files'"
        return [Finding("open files", "warning", text, f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")]
    return [Finding("open files", "ok", f"a process may open {'any number of' if soft == resource.RLIM_INFINITY else soft} files")]
