"""Locks that a killed build left in torch's extensions folder. Every later start waits for them, indefinitely and silently.

torch/utils/cpp_extension.py builds an extension under a file `lock` (torch/utils/file_baton.py): the builder creates the file and keeps it
open until it removes it; all other processes wait until the file is gone. A killed builder never removes it. `clear` removes such a lock
if no process can have it open, and reports all others.

Shell scripts run `python smartfrz_ds/integrations/build_locks.py`, which imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["built", "orphaned", "abandoned", "unclear"]

# File systems that belong to one host: a process with an open file on them runs on this host. On any other (nfs, lustre, 9p, fuse, …) the
# builder may run on another host.
_LOCAL = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"})
# torch closes the file before it removes it: for an instant, a running builder does not have it open.
_RELEASE_SECONDS = 0.5
# Without a lease only the list of open files is left, which does not show processes of other containers. The lock must then also be older
# than any build takes. The longest build, DeepSpeed's CPUAdam, takes about two minutes.
_BUILD_SECONDS = 600.0

logger = logging.getLogger("smartfrz_ds")


@dataclass(frozen=True)
class BuildLock:
    """A lock and its state.

    Attributes:
        path: The lock file.
        state: "built": a process has it open. "orphaned": no process has it open, but one that the builder started is still running.
            "abandoned": no process uses it. "unclear": the state cannot be determined.
        age: Seconds since its creation.
        why: The evidence for the state, as text.
    """

    path: Path
    state: State
    age: float
    why: str

    @property
    def answer(self) -> str:
        """The action for the user."""
        if self.state == "built":
            return "wait for it"
        if self.state == "abandoned":
            return f"remove it: rm '{self.path}'"
        return f"if no build is running: rm '{self.path}'"

    def __str__(self) -> str:
        age = f"{self.age:.0f} seconds" if self.age < 120 else f"{self.age / 60:.0f} minutes"
        return f"{self.path} is {age} old: {self.why}"


def extensions_folder() -> Path:
    """Where torch builds extensions: TORCH_EXTENSIONS_DIR, else torch's default (torch/utils/cpp_extension.py: get_default_build_root)."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)


def find(folder: Path | None = None) -> list[BuildLock]:
    """Examine all build locks in a folder, without changing anything.

    Args:
        folder: Default: `extensions_folder`.

    Returns:
        The locks, sorted by path.
    """
    found = []
    for path in _paths(folder):
        with contextlib.suppress(FileNotFoundError), _examined(path) as lock:
            found.append(lock)
    return found


def clear(folder: Path | None = None, *, say: Callable[[str], None] | None = None) -> list[BuildLock]:
    """Remove the abandoned build locks in a folder and report the others.

    A lock is removed only on a local file system, and only if no process has it open. The kernel grants a write lease only on such a file,
    whichever user or container another process belongs to, and no process can open the file while the lease is held. Where leases are not
    available, the open files of all processes are listed, and the lock must be older than any build takes.

    Every rank of a host calls this before it may need an extension: a rank that already waits for a lock which is then removed would load
    an extension that was never built. The first rank removes the lock, local rank 0 reports the remaining ones.

    Args:
        folder: Default: `extensions_folder`.
        say: Receives each message; default: a warning of the logger "smartfrz_ds".

    Returns:
        The locks that remain.
    """
    say = say or logger.warning
    left = []
    for path in _paths(folder):
        lock: BuildLock | None = None
        end = time.monotonic() + _BUILD_SECONDS
        try:
            while lock is None or (lock.state == "orphaned" and time.monotonic() < end):
                if lock is not None:  # the killed builder's compiler would write into the next build
                    time.sleep(0.5)
                with _examined(path) as lock:
                    if lock.state == "abandoned" and _removed(path):
                        say(f"smartfrz: removed the lock of a killed build: {lock}")
                        lock = None
                        break
        except FileNotFoundError:  # another rank removed it, or the build has finished
            continue
        if lock is not None:
            left.append(lock)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                say(f"smartfrz: this start waits until a build lock is gone: {lock}; {lock.answer}")
    return left


def _paths(folder: Path | None) -> list[Path]:
    """FOLDER/EXTENSION/lock and, in torch's default folder, FOLDER/pyXY_ACCELERATOR/EXTENSION/lock."""
    folder = extensions_folder() if folder is None else folder
    return sorted({*folder.glob("lock"), *folder.glob("*/lock"), *folder.glob("*/*/lock")})


@contextlib.contextmanager
def _examined(path: Path) -> Iterator[BuildLock]:
    """Examine a lock. Inside the block, no other process can open an abandoned one.

    Raises:
        FileNotFoundError: The lock is gone.
    """
    status = path.lstat()
    age = max(0.0, time.time() - status.st_mtime)
    if not stat.S_ISREG(status.st_mode) or status.st_size:
        yield BuildLock(path, "unclear", age, "it is not an empty file, unlike torch's locks")
        return
    kind = filesystem_of(path)
    if kind not in _LOCAL:
        yield BuildLock(path, "unclear", age, f"it is on a file system ({kind or 'unknown'}) on which another host may be building")
        return
    with _one_examiner(path.parent):
        yield from _examined_alone(path, age)


def _examined_alone(path: Path, age: float) -> Iterator[BuildLock]:
    file, why = _open(path)
    try:
        if file is None:
            yield BuildLock(path, "unclear", age, why)
            return
        leased = _lease(file)
        holder, worker, whole = _processes(path)
        if leased is False or holder is not None:
            yield BuildLock(path, "built", age, f"{'a process' if holder is None else f'process {holder}'} is building")
        elif worker is not None:
            yield BuildLock(path, "orphaned", age, f"its builder has ended, but process {worker} is still running in its folder")
        elif leased:
            yield BuildLock(path, "abandoned", age, "no process has it open")
        elif not whole:
            yield BuildLock(path, "unclear", age, "the open files of other users' processes can't be listed here")
        elif age < _BUILD_SECONDS:
            yield BuildLock(path, "unclear", age, "no visible process has it open, but it is younger than a build can take")
        else:
            yield BuildLock(path, "abandoned", age, "no process has it open, and it is older than a build can take")
    finally:
        if file is not None:
            os.close(file)


@contextlib.contextmanager
def _one_examiner(folder: Path) -> Iterator[None]:
    """Let the ranks of a host examine the lock in this folder one after another: each would take the others' open files for a builder's."""
    try:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError:  # without a lock of ours, a rank may take another rank for a builder, and reports a lock that it could have removed
        yield
        return
    try:
        for _ in range(1200):  # a minute
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)  # torch locks neither the folder nor the file
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK):
                    break
                time.sleep(0.05)
        yield
    finally:
        os.close(place)


def _open(path: Path) -> tuple[int | None, str]:
    """Open the lock for reading.

    Returns:
        (file descriptor, "") or (None, the reason).
    """
    for _ in range(1200):  # a minute
        try:
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), ""
        except BlockingIOError:  # another rank holds the lease and is removing the lock
            time.sleep(0.05)
        except PermissionError:
            return None, f"it belongs to user {path.lstat().st_uid}"
    return None, "another process is examining it"


def _lease(file: int) -> bool | None:
    """Whether the kernel grants a write lease, which it does only if no other process has the file open (fcntl(2)). None: unknown."""
    try:
        # A process that opens the file breaks the lease. The default signal for that, SIGIO, would end this process; SIGURG is ignored.
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK) else None
    return True


def _processes(path: Path, proc: Path = Path("/proc")) -> tuple[int | None, int | None, bool]:
    """Look for processes, other than this one, that use the lock.

    Returns:
        A process that has the file open, a process whose working directory is its folder (torch starts ninja there), and whether all
        processes could be examined.
    """
    file, place, whole = _identity(path), _identity(path.parent), True
    worker: int | None = None
    for folder in proc.glob("[0-9]*"):
        if folder.name == str(os.getpid()):
            continue
        try:
            if _identity(folder / "cwd") == place:
                worker = int(folder.name)
            for link in (folder / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if _identity(link) == file:
                        return int(folder.name), worker, whole
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except OSError:
            whole = False
    return None, worker, whole


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _removed(path: Path) -> bool:
    """Remove an abandoned lock.

    Returns:
        False where the permissions do not allow it.

    Raises:
        FileNotFoundError: Its builder removed it.
    """
    before = _identity(path)
    time.sleep(_RELEASE_SECONDS)
    if _identity(path) != before:
        raise FileNotFoundError(path)  # that build has finished, and the next one has started
    try:
        path.unlink()
    except PermissionError:
        return False
    return True


def filesystem_of(path: Path, mounts: str | None = None) -> str:
    """Return the type of a path's file system, such as "ext4" or "nfs4"; "" where unknown.

    Args:
        path: An existing path.
        mounts: Text in the format of /proc/self/mountinfo. Default: that file's content.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return ""
    real = Path(os.path.realpath(path))
    best, kind = -1, ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")  # proc(5): the number of fields before the separator varies
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        point = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4]))  # spaces are written as \040
        if (real == point or point in real.parents) and len(point.parts) >= best:  # a later mount hides an earlier one
            best, kind = len(point.parts), right.split()[0]
    return kind


def main() -> None:
    """Clear the locks of the folder in the arguments, default `extensions_folder`. The exit code is 0 even if locks remain."""
    if len(sys.argv) > 2 or (sys.argv[1:] and sys.argv[1].startswith("-")):
        sys.exit("usage: python -m smartfrz_ds.integrations.build_locks [FOLDER]")
    clear(Path(sys.argv[1]) if sys.argv[1:] else None, say=lambda line: print(line, file=sys.stderr))


if __name__ == "__main__":
    main()
