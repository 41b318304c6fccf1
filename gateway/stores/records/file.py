"""Where the books lie: on a local disk, in a file that no other instance writes; and how a broken one is put away."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

MOST_INSTANCES = 64
SIDES = ("", "-wal", "-shm")  # the files of one database

# SQLite's WAL needs memory shared by all who have the file open, and locks that hold; these have neither.
_NETWORK = frozenset(
    "9p acfs afs beegfs ceph cifs fuse glusterfs gpfs juicefs lustre ncpfs nfs nfs4 ocfs2 orangefs smb3 smbfs".split()
)
_LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.snapfuse"})
_OCTAL = re.compile(r"\\([0-7]{3})")


def filesystem_of(path: Path, mountinfo: str) -> str:
    """The kind of file system that an absolute path lies on, by the text of /proc/self/mountinfo; "" if unknown."""
    best, kind = -1, ""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, about = before.split(), after.split()
        if len(fields) < 5 or not about:
            continue
        mount = Path(_OCTAL.sub(lambda code: chr(int(code[1], 8)), fields[4]))
        if path.is_relative_to(mount) and len(mount.parts) >= best:  # of two on one place the later one covers
            best, kind = len(mount.parts), about[0]
    return kind


def on_network(kind: str) -> bool:
    return kind in _NETWORK or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)


def places(path: Path, local: Path, instance: str, network: bool) -> Iterator[Path]:
    """The files to try, best first. The first that no other instance holds is ours; the order does not change, so
    that instances find their files again."""
    first = local / f"{path.stem}-{instance}{path.suffix}" if network else path
    yield first
    for number in range(2, MOST_INSTANCES + 1):
        yield first.with_name(f"{first.stem}-{number}{first.suffix}")


class Claim:
    """A file that is ours until `release`, or until this process ends, however it ends."""

    def __init__(self, path: Path, wanted: Path, lock: int) -> None:
        self.path = path
        self.moved = path != wanted  # elsewhere than was asked for
        self._lock = lock

    def release(self) -> None:
        os.close(self._lock)


def claim(path: Path, local: Path, instance: str) -> Claim:
    """Raises OSError."""
    path = path.absolute()
    network = on_network(filesystem_of(path.parent.resolve(), _mountinfo()))
    for place in places(path, local, instance, network):
        if network:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if place.parent.stat().st_uid != os.geteuid():  # in /tmp, anybody may have made it first
                raise OSError(f"{place.parent} belongs to someone else")
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(place)
        if lock is not None:
            return Claim(place, path, lock)
    raise OSError(f"{MOST_INSTANCES} instances hold the files beside {path}")


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock; None where another one does.

    The lock is on a file of its own: SQLite's own locks on the database would go with any descriptor of it that closes.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    lock = os.open(path.with_name(path.name + "-lock"), flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        os.close(lock)
        raise
    return lock


def make_private(path: Path) -> None:
    """A new file that only we may read: there are key ids in it, and prompts if that is asked for. Raises OSError."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return


def set_aside(path: Path, why: str) -> Path:
    """Renames a database, with its date, and gives the new name. Raises OSError."""
    stamp = time.strftime("%Y%m%d_%H%M%S", time.gmtime())
    for number in itertools.count(1):
        target = path.with_name(f"{path.name}.{why}-{stamp}" + (f"-{number}" if number > 1 else ""))
        if not target.exists():
            break
    for side in reversed(SIDES):  # the log first: left behind, it would be taken for that of the new file
        old = path.with_name(path.name + side)
        if old.exists():
            old.rename(target.with_name(target.name + side))
    return target


def _mountinfo() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:
        return ""
