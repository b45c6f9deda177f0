"""Locks that a killed build left in torch's folder of extensions: every later start waits for them, indefinitely and silently.

torch/utils/cpp_extension.py builds an extension under a file `lock` (torch/utils/file_baton.py): the builder creates it and keeps it open
until it removes it; any other process waits until the file is gone. A builder that was killed never removes it. `clear` removes such a lock
where it is proven that no process has it open, and names every other one.

`python smartfrz_ds/integrations/build_locks.py` does that for a shell script; it imports neither torch nor DeepSpeed.
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

# File systems of one host alone: a process that has a file of theirs open runs on this host. Anything else (nfs, lustre, 9p, fuse, …) may
# have its builder elsewhere.
_LOCAL = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"})
# torch closes the file before it removes it: an instant in which a builder that lives has it no longer open.
_RELEASE_SECONDS = 0.5
# Without a lease there is the list of open files alone, which shows no process of another container: then the lock must be older than any
# build besides. The longest, of DeepSpeed's CPUAdam, takes about two minutes.
_BUILD_SECONDS = 600.0

logger = logging.getLogger("smartfrz_ds")


@dataclass(frozen=True)
class BuildLock:
    """A lock and what is known of it.

    state: "built": a process has it open; "orphaned": none has, but a process that the builder started is still at work; "abandoned": no
        process has to do with it; "unclear": that can't be told.
    age: seconds since it was made. why: for people, what the state is told from.
    """

    path: Path
    state: State
    age: float
    why: str

    @property
    def answer(self) -> str:
        """What a person should do."""
        if self.state == "built":
            return "wait for it"
        if self.state == "abandoned":
            return f"remove it: rm '{self.path}'"
        return f"if nothing is being built now: rm '{self.path}'"

    def __str__(self) -> str:
        age = f"{self.age:.0f} seconds" if self.age < 120 else f"{self.age / 60:.0f} minutes"
        return f"{self.path} is {age} old: {self.why}"


def extensions_folder() -> Path:
    """Where torch builds extensions: TORCH_EXTENSIONS_DIR, else its own place (torch/utils/cpp_extension.py, get_default_build_root)."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)


def find(folder: Path | None = None) -> list[BuildLock]:
    """All build locks under `folder` (default: `extensions_folder`), examined, in the order of their paths. Nothing is changed."""
    found = []
    for path in _paths(folder):
        with contextlib.suppress(FileNotFoundError), _examined(path) as lock:
            found.append(lock)
    return found


def clear(folder: Path | None = None, *, say: Callable[[str], None] | None = None) -> list[BuildLock]:
    """Remove the abandoned build locks under `folder`, name the others, and return those that are left.

    A lock is removed only on a local file system, when no process has it open: the kernel grants a lease for writing only on such a file,
    whichever user or container the other process belongs to and however young it is, and while it is held no process can open the file.
    Where there are no leases, it takes a list of all processes' open files, and an age that no build reaches.
    Every rank of a host calls this, before it may need an extension: a rank that waited for a lock that is removed meanwhile would load an
    extension that was never built. The first one removes it, local rank 0 names what is left.

    folder: default: `extensions_folder`. say: takes a line for people; default: a warning in the log of "smartfrz_ds".
    """
    say = say or logger.warning
    left = []
    for path in _paths(folder):
        lock: BuildLock | None = None
        end = time.monotonic() + _BUILD_SECONDS
        try:
            while lock is None or (lock.state == "orphaned" and time.monotonic() < end):
                if lock is not None:  # the compiler of a builder that was killed would write into the next build
                    time.sleep(0.5)
                with _examined(path) as lock:
                    if lock.state == "abandoned" and _removed(path):
                        say(f"smartfrz: removed a lock that a killed build left: {lock}")
                        lock = None
                        break
        except FileNotFoundError:  # another rank was here, or the builder is done
            continue
        if lock is not None:
            left.append(lock)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                say(f"smartfrz: this start waits as long as a build lock is there: {lock}; {lock.answer}")
    return left


def _paths(folder: Path | None) -> list[Path]:
    """FOLDER/EXTENSION/lock, and, in torch's own place, FOLDER/pyXY_ACCELERATOR/EXTENSION/lock."""
    folder = extensions_folder() if folder is None else folder
    return sorted({*folder.glob("lock"), *folder.glob("*/lock"), *folder.glob("*/*/lock")})


@contextlib.contextmanager
def _examined(path: Path) -> Iterator[BuildLock]:
    """What is known of a lock. While it is given, an abandoned one can't be opened by another process.

    Raises FileNotFoundError where there is none any more.
    """
    status = path.lstat()
    age = max(0.0, time.time() - status.st_mtime)
    if not stat.S_ISREG(status.st_mode) or status.st_size:
        yield BuildLock(path, "unclear", age, "it is not an empty file, as torch's locks are")
        return
    kind = filesystem_of(path)
    if kind not in _LOCAL:
        yield BuildLock(path, "unclear", age, f"it lies on a file system ({kind or 'unknown'}) that another host may be building on")
        return
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
            yield BuildLock(path, "orphaned", age, f"its builder has ended, but process {worker} is still at work in its folder")
        elif leased:
            yield BuildLock(path, "abandoned", age, "no process has it open")
        elif not whole:
            yield BuildLock(path, "unclear", age, "the open files of other users' processes can't be listed here")
        elif age < _BUILD_SECONDS:
            yield BuildLock(path, "unclear", age, "no process that is visible here has it open, but it is younger than a build can take")
        else:
            yield BuildLock(path, "abandoned", age, "no process has it open, and it is older than a build can take")
    finally:
        if file is not None:
            os.close(file)


def _open(path: Path) -> tuple[int | None, str]:
    """The lock, opened for reading; or None, and why not."""
    for _ in range(1200):  # a minute
        try:
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), ""
        except BlockingIOError:  # another rank has the lease just now, and removes it
            time.sleep(0.05)
        except PermissionError:
            return None, f"it belongs to user {path.lstat().st_uid}"
    return None, "another process examines it"


def _lease(file: int) -> bool | None:
    """Whether the kernel grants a lease for writing: only where no other open file is this one. None: it can't be told (fcntl(2))."""
    try:
        # A process that opens the file breaks the lease, and the default signal for that, SIGIO, would end this one. SIGURG is ignored.
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK) else None
    return True


def _processes(path: Path, proc: Path = Path("/proc")) -> tuple[int | None, int | None, bool]:
    """A process other than this one that has the file open, one that works in its folder (torch starts ninja there), and whether all
    processes could be looked at."""
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
    """Remove an abandoned lock; whether that was allowed. Raises FileNotFoundError where its builder does it itself."""
    before = _identity(path)
    time.sleep(_RELEASE_SECONDS)
    if _identity(path) != before:
        raise FileNotFoundError(path)  # it was done, and the next one has begun
    try:
        path.unlink()
    except PermissionError:
        return False
    return True


def filesystem_of(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that a path lies on, e.g. "ext4" or "nfs4"; "" where that is unknown.

    mounts: text in the form of /proc/self/mountinfo (default: that file's).
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return ""
    real = Path(os.path.realpath(path))
    best, kind = -1, ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")  # proc(5): the fields before the separator vary in number
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        point = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4]))  # spaces are written as \040
        if (real == point or point in real.parents) and len(point.parts) >= best:  # a later mount hides an earlier one
            best, kind = len(point.parts), right.split()[0]
    return kind


def main() -> None:
    """Clear the locks of the folder that is named, or of `extensions_folder`; the exit code is 0 in any case."""
    if len(sys.argv) > 2 or (sys.argv[1:] and sys.argv[1].startswith("-")):
        sys.exit("usage: python -m smartfrz_ds.integrations.build_locks [FOLDER]")
    clear(Path(sys.argv[1]) if sys.argv[1:] else None, say=lambda line: print(line, file=sys.stderr))


if __name__ == "__main__":
    main()
