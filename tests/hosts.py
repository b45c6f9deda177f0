"""Two hosts on one machine: network namespaces with a link between them, each with its own address and host name.

    with two_hosts() as (a, b):
        a.start(["hostname"])

What a process in one of them sees: eth0 with its address, the other's name and its own in /etc/hosts, its own /dev/shm. Files are shared,
as on a cluster with one file system. Needs root and iproute2; `refusal()` says what is missing.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import pytest
from helpers import ROOT, RanksFailed, environment

SYSTEM = "./tests/run.sh --system, as root, installs what is missing"
PORT = 29500  # the namespaces are new: nobody else has it


class Host:
    """One of them. name: its host name; address: of its eth0."""

    def __init__(self, namespace: str, name: str, address: str) -> None:
        self.namespace, self.name, self.address = namespace, name, address

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> subprocess.Popen[str]:
        """Start a command there, its output merged into stdout."""
        inside = 'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", inside, self.name, *command],
            env=environment() | dict(env or {}),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def pids(self) -> list[int]:
        """All processes there."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def find(self, *words: str) -> list[int]:
        """The processes there whose command line has all of these words, oldest first."""
        found = []
        for pid in sorted(self.pids()):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if all(word in line for word in words):
                found.append(pid)
        return found

    def unplug(self) -> None:
        """The link goes down: what is sent gets lost, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        _ip("-n", self.namespace, "link", "set", "eth0", "up")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """node-a (10.77.0.1) and node-b (10.77.0.2). Afterwards their processes are killed, and nothing of them is left."""
    if reason := refusal():
        pytest.skip(reason)
    run = uuid4().hex[:6]
    hosts = Host(f"frz{run}a", "node-a", "10.77.0.1"), Host(f"frz{run}b", "node-b", "10.77.0.2")
    names = "127.0.0.1 localhost\n" + "".join(f"{h.address} {h.name}\n" for h in hosts)
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            etc = Path("/etc/netns", host.namespace)  # `ip netns exec` puts what is there over /etc
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(names)
        _ip("link", "add", f"v{run}a", "type", "veth", "peer", "name", f"v{run}b")
        for host, end in zip(hosts, "ab", strict=True):
            _ip("link", "set", f"v{run}{end}", "netns", host.namespace, "name", "eth0")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
        yield hosts
    finally:
        for host in hosts:
            _remove(host)


def both(
    hosts: Sequence[Host], command: Sequence[Sequence[str]], *, timeout: float, env: Mapping[str, str] | None = None, check: bool = True
) -> list[subprocess.CompletedProcess[str]]:
    """Run one command on each host at the same time, to their ends. Past the time limit every process prints its stacks and is killed."""
    started = [host.start(line, env) for host, line in zip(hosts, command, strict=True)]
    return finish(hosts, started, timeout=timeout, check=check)


def finish(
    hosts: Sequence[Host], started: Sequence[subprocess.Popen[str]], *, timeout: float, check: bool = True
) -> list[subprocess.CompletedProcess[str]]:
    """Wait for what was started, one process a host.

    Raises:
        RanksFailed: out of time; or, with check, a command that failed.
    """
    end, late = time.monotonic() + timeout, False
    outputs = []
    for process in started:
        try:
            outputs.append(process.communicate(timeout=max(0.1, end - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            late = True
            for number in (signal.SIGABRT, signal.SIGKILL):  # faulthandler prints the stacks at the first
                for pid in [pid for host in hosts for pid in host.find("python")]:
                    _kill(pid, number)
                time.sleep(2)
            outputs.append(process.communicate()[0])
    done = [subprocess.CompletedProcess(p.args, p.returncode, out, "") for p, out in zip(started, outputs, strict=True)]
    if late or (check and any(p.returncode for p in done)):
        told = "".join(f"\n--- {h.name}: exit code {p.returncode}\n{p.stdout[-6000:]}" for h, p in zip(hosts, done, strict=True))
        raise RanksFailed(f"no end after {timeout} s{told}" if late else told)
    return done


@functools.cache
def refusal() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "two hosts are made of network namespaces, which needs root"
    if not shutil.which("ip") or not shutil.which("tc"):
        return f"two hosts are made of network namespaces, which needs iproute2 ({SYSTEM})"
    name = f"frz{uuid4().hex[:6]}t"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        _ip("netns", "exec", name, "unshare", "--uts", "hostname", "node-t")
    except RuntimeError as error:
        return f"two hosts are made of network namespaces, which are not allowed here: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return ""


def need(*programs: str) -> None:
    """Skip the test where one of these programs is missing."""
    path = environment()["PATH"] + os.pathsep + "/usr/sbin"
    if missing := [p for p in programs if not shutil.which(p, path=path)]:
        pytest.skip(f"{', '.join(missing)} missing ({SYSTEM})")


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _remove(host: Host) -> None:
    try:
        for _ in range(20):
            if not (pids := host.pids()):
                break
            for pid in pids:
                _kill(pid, signal.SIGKILL)
            time.sleep(0.1)
    except RuntimeError:
        pass  # it was never made
    subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)  # takes the link with it
    shutil.rmtree(Path("/etc/netns", host.namespace), ignore_errors=True)
