"""The keys file on disk: read whole or not at all, written by one writer at a time, replaced or rewritten in place.

The lock is on the file itself and not on one beside it, because of a single-file bind mount the two sides share nothing
else. A rename makes the lock one on a file that is gone, so whoever gets it looks whether the path still leads there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gateway.stores.keys.file import KeyFile

MAX_BYTES = 16 * 1024 * 1024

# What a rename or a new file in the folder says where the file can only be rewritten in place: a bind mount, another
# device, a folder or an owner that we may not touch.
_IN_PLACE = {errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS}
# Some network volumes know no locks; there the rename alone has to do.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_RETRY = 0.02

_HEADER = b"""\
# Corral's API keys, one a line: key_id:secret[:requests_per_minute][:expiry] [scope=infer models=qwen-* ...]
# Written by `corral keys`, and may be edited by hand; the gateway sees a change within 2 seconds.
"""

Signature = tuple[int, int, int, int, int, int]


class KeyFileBusy(TimeoutError):
    """Another process held the lock, or kept writing, for longer than we wait."""


def signature(found: os.stat_result) -> Signature:
    """What changes when the file does; ctime too, since mtime and size survive `cp -p` and `touch -r`."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_nlink


def modified(found: Signature) -> float:
    return found[3] / 1e9


def is_empty(found: Signature) -> bool:
    return found[2] == 0


def is_cut_off(path: Path, read: Signature) -> bool:
    """Whether the path leads to a file that is in no folder any more, as a mount of it does when it was replaced."""
    if read[5]:
        return False
    try:
        return path.stat().st_nlink == 0  # else it was replaced here while it was read
    except OSError:
        return False


def read(path: Path, *, wait: float = 1.0) -> tuple[bytes, Signature]:
    """The file's whole content, never a half-written one of a writer that locks. Raises OSError."""
    deadline = time.monotonic() + wait
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_kind(path, os.fstat(fd))
        _lock(fd, fcntl.LOCK_SH, path, deadline)
        while True:
            before = signature(os.fstat(fd))
            data = _read_all(fd)
            if before == signature(os.fstat(fd)) and len(data) == before[2]:
                return data, before
            _pause(path, deadline)  # someone writes without the lock: an editor, `docker cp`
    finally:
        os.close(fd)


@contextlib.contextmanager
def edit(path: Path, *, create: bool = False, wait: float = 10.0) -> Iterator[KeyFile]:
    """The file for changing, locked; written on leaving without an exception, if it was changed. Raises OSError."""
    target = path.resolve()  # a link stays a link
    if create:
        target.parent.mkdir(parents=True, exist_ok=True)
    fd = _open_locked(target, create, time.monotonic() + wait)
    try:
        held = os.fstat(fd)
        _check_kind(path, held)
        old = _read_all(fd)
        keys = KeyFile(old or _HEADER)
        unchanged = keys.encode()
        yield keys
        new = keys.encode()
        if new != unchanged:
            _write(fd, target, held, old, new)
    finally:
        os.close(fd)


def _open_locked(target: Path, create: bool, deadline: float) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_CREAT if create else 0)
    while True:
        fd = os.open(target, flags, 0o600)
        try:
            _lock(fd, fcntl.LOCK_EX, target, deadline)
            held = os.fstat(fd)
            with contextlib.suppress(FileNotFoundError):
                now = target.stat()
                if (now.st_dev, now.st_ino) == (held.st_dev, held.st_ino):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # replaced while we waited


def _lock(fd: int, how: int, path: Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            _pause(path, deadline)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            raise


def _pause(path: Path, deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise KeyFileBusy(errno.EAGAIN, "another process holds or writes it", str(path))
    time.sleep(_RETRY)  # flock(2) has no time-out of its own; callers are threads and commands, not the loop


def _check_kind(path: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(
            errno.EISDIR, "it is a folder (Docker makes one where the file to mount is missing)", str(path)
        )
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if found.st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, more than {MAX_BYTES}", str(path))


def _read_all(fd: int) -> bytes:
    parts = []
    offset = 0
    while part := os.pread(fd, 1 << 20, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _write(fd: int, target: Path, held: os.stat_result, old: bytes, new: bytes) -> None:
    try:
        _replace(target, held, new)
    except OSError as error:
        if error.errno not in _IN_PLACE:
            raise
        _rewrite(fd, old, new)


def _replace(target: Path, held: os.stat_result, data: bytes) -> None:
    """A new file in the old one's place, with its owner and mode; readers see the one or the other."""
    fd, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            made = os.fstat(fd)
            if (made.st_uid, made.st_gid) != (held.st_uid, held.st_gid):
                os.fchown(fd, held.st_uid, held.st_gid)
            os.fchmod(fd, stat.S_IMODE(held.st_mode))
            file.write(data)
            file.flush()
            os.fsync(fd)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # the rename has happened; where folders cannot be synced, so be it
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _rewrite(fd: int, old: bytes, new: bytes) -> None:
    """In place, under the lock. Nothing before the first difference is touched, so adding a key only appends; and what
    makes the file longer is written first, so that a full disk is noticed while the old content still stands."""
    start = _first_difference(old, new)
    try:
        if len(new) > len(old):
            _write_all(fd, new[len(old) :], len(old))
            os.fsync(fd)
    except OSError:
        os.ftruncate(fd, len(old))
        raise
    _write_all(fd, new[start : len(old)], start)
    os.ftruncate(fd, len(new))
    os.fsync(fd)


def _first_difference(old: bytes, new: bytes) -> int:
    shorter = min(len(old), len(new))
    return next((i for i in range(shorter) if old[i] != new[i]), shorter)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
