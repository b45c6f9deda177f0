"""Locks of killed builds: what is removed, what is left alone and named."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from smartfrz_ds.integrations import build_locks
from smartfrz_ds.integrations.build_locks import BuildLock, clear, filesystem_of, find

MODULE = Path(build_locks.__file__)
# torch's own lock, without the seconds that importing torch takes
BATON = Path(str(importlib.util.find_spec("torch").origin)).parent / "utils" / "file_baton.py"  # type: ignore[union-attr]
BUILDER = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("file_baton", {str(BATON)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
baton = module.FileBaton(sys.argv[1])
assert baton.try_acquire()
print("building", flush=True)
if sys.stdin.readline():
    baton.release()
"""


@contextmanager
def builder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds torch's lock until it is told a line, killed at the end if it lives."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", BUILDER, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "building\n"
            yield process
        finally:
            process.kill()


def killed(lock: Path) -> Path:
    with builder(lock):
        pass
    assert lock.exists()
    return lock


def aged(lock: Path, seconds: float = 3600) -> Path:
    then = time.time() - seconds
    os.utime(lock, (then, then))
    return lock


def told(folder: Path) -> tuple[list[BuildLock], list[str]]:
    lines: list[str] = []
    return clear(folder, say=lines.append), lines


def test_a_living_builders_lock_is_left_alone_and_a_killed_ones_is_removed(tmp_path: Path) -> None:
    """Of the same lock, at any age: only that it is open tells the two apart."""
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    with builder(lock) as process:
        for _ in range(2):
            (left,), (line,) = told(tmp_path)
            assert left.state == "built" and lock.exists()
            assert str(lock) in line and f"process {process.pid} is building; wait for it" in line
            aged(lock)
    (line,) = told(tmp_path)[1]
    assert not lock.exists() and f"removed the lock of a killed build: {lock} is 60 minutes old" in line
    assert told(tmp_path) == ([], [])
    killed(lock)  # seconds old
    assert find(tmp_path)[0].state == "abandoned" and lock.exists()
    assert told(tmp_path)[0] == [] and not lock.exists()


def test_looking_at_a_lock_disturbs_nobody(tmp_path: Path) -> None:
    """Its builder gets no signal and releases it as always; an abandoned one can be opened again."""
    lock = tmp_path / "op" / "lock"
    with builder(lock) as process:
        for _ in range(20):
            find(tmp_path)
        assert process.communicate("release\n") is not None and process.returncode == 0
    assert not lock.exists()
    killed(lock)
    find(tmp_path)
    with lock.open():
        assert find(tmp_path)[0].state == "built"


def test_ranks_that_examine_at_once_do_not_take_each_other_for_builders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Background: two ranks had the abandoned lock open at the same instant, and each reported that the other was building."""
    lock = killed(tmp_path / "op" / "lock")
    lease = build_locks._lease

    def slow(file: int) -> bool | None:
        time.sleep(0.5)  # both have opened the lock before one asks for the lease
        return lease(file)

    monkeypatch.setattr(build_locks, "_lease", slow)
    with ThreadPoolExecutor(2) as ranks:
        (left, said), (left2, said2) = ranks.map(told, [tmp_path, tmp_path])
    assert not lock.exists() and left == left2 == []
    assert len(said + said2) == 1 and "removed the lock of a killed build" in (said + said2)[0]


def test_without_leases_it_takes_all_open_files_and_an_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "op" / "lock"
    monkeypatch.setattr(build_locks, "_lease", lambda file: None)
    with builder(lock) as process:
        aged(lock)
        assert f"process {process.pid} is building" in told(tmp_path)[1][0] and lock.exists()
    aged(lock, 30)
    own, proc = build_locks._processes, tmp_path / "proc"
    (proc / "1").mkdir(parents=True)
    (proc / "1" / "cwd").symlink_to("/")
    (proc / "1" / "fd").touch()  # a folder that can't be listed, as that of another user's process
    assert own(lock, proc) == (None, None, False)
    shutil.rmtree(proc)
    monkeypatch.setattr(build_locks, "_processes", lambda path: (None, None, True))
    (left,), (line,) = told(tmp_path)
    assert left.state == "unclear" and "younger than a build can take; if no build is running: rm" in line and lock.exists()
    aged(lock)
    monkeypatch.setattr(build_locks, "_processes", lambda path: (None, None, False))
    assert "other users' processes can't be listed" in told(tmp_path)[1][0] and lock.exists()
    monkeypatch.setattr(build_locks, "_processes", lambda path: (None, None, True))
    assert told(tmp_path)[0] == [] and not lock.exists()


def test_a_compiler_that_outlives_its_builder_is_waited_for(tmp_path: Path) -> None:
    """torch starts ninja in the folder of the extension. A build beside it would write the same files."""
    lock = killed(tmp_path / "op" / "lock")
    with subprocess.Popen(["sleep", "2"], cwd=lock.parent) as compiler:
        assert find(tmp_path)[0].state == "orphaned" and f"process {compiler.pid} is still running" in str(find(tmp_path)[0])
        assert told(tmp_path)[0] == [] and not lock.exists()
        assert not Path(f"/proc/{compiler.pid}/cwd").exists() or compiler.poll() is not None


MOUNTS = r"""
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:30 / /home rw shared:5 - nfs4 server:/home rw
31 30 0:31 / /home/me/scratch rw - xfs /dev/sdb rw
32 22 0:32 / /with\040space rw - lustre fs rw
33 22 0:33 / /home2 rw - tmpfs tmpfs rw
34 33 0:34 / /home2 rw - fuse.sshfs far rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lock", "ext4"),
        ("/home/me/.cache/lock", "nfs4"),
        ("/home/me/scratch/op/lock", "xfs"),
        ("/homestead/lock", "ext4"),  # no prefix of letters
        ("/with space/lock", "lustre"),
        ("/home2/lock", "fuse.sshfs"),  # mounted over the other one
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str) -> None:
    assert filesystem_of(Path(path), MOUNTS) == kind
    assert filesystem_of(Path(path), "") == ""


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "9p", "fuse.sshfs", ""])
def test_where_another_host_may_build_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    lock = aged(killed(tmp_path / "op" / "lock"), 1e6)
    monkeypatch.setattr(build_locks, "filesystem_of", lambda path: kind)
    (left,), (line,) = told(tmp_path)
    assert lock.exists() and left.state == "unclear"
    assert f"({kind or 'unknown'}) on which another host may be building; if no build is running: rm '{lock}'" in line


def test_what_is_no_lock_of_torchs_is_left_alone(tmp_path: Path) -> None:
    for name in ("full", "link", "folder", "a/b/deep"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "full" / "lock").write_text("somebody's")
    (tmp_path / "link" / "lock").symlink_to(tmp_path / "target")
    (tmp_path / "target").touch()
    (tmp_path / "folder" / "lock").mkdir()
    (tmp_path / "a" / "b" / "deep" / "lock").touch()  # deeper than torch's
    before = sorted(tmp_path.rglob("*"))
    left, lines = told(tmp_path)
    assert {lock.path.parent.name for lock in left} == {"full", "link", "folder"} and len(lines) == 3
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_another_users_lock_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        lock = aged(killed(folder / "op" / "lock"))
        shutil.copy(MODULE, folder / "build_locks.py")
        python = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or sys.executable
        done = subprocess.run(
            [python, "-S", str(folder / "build_locks.py"), name], user=65534, cwd="/", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and lock.exists(), done.stderr
        assert f"if no build is running: rm '{lock}'" in done.stderr, done.stderr


def test_ranks_that_start_together_remove_each_lock_once(tmp_path: Path) -> None:
    """The command, alone: neither torch nor DeepSpeed is there for it."""
    locks = [tmp_path / f"op{i}" / "lock" for i in range(4)]
    for lock in locks:
        lock.parent.mkdir()
        lock.touch()
    with builder(tmp_path / "living" / "lock") as process:
        started = [
            subprocess.Popen([sys.executable, "-I", "-S", str(MODULE), name], stderr=subprocess.PIPE, text=True)
            for name in [str(tmp_path)] * 4
        ]
        texts = [p.communicate()[1] for p in started]
        assert [p.returncode for p in started] == [0] * 4, texts
        assert (tmp_path / "living" / "lock").exists()
        assert sum(text.count(f"process {process.pid} is building") for text in texts) == 4
    removed = [line for text in texts for line in re.findall(r"removed the lock of a killed build: (\S+/lock)", text)]
    assert sorted(removed) == sorted(map(str, locks))


def test_only_local_rank_0_reports_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    with lock.open("w"):
        for rank, expected in (("1", 0), ("0", 1)):
            monkeypatch.setenv("LOCAL_RANK", rank)
            assert len(told(tmp_path)[1]) == expected
