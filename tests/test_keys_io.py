"""The keys file on disk: one writer at a time, replaced or rewritten in place, and never read half-written."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gateway.stores.keys import io as keyio
from gateway.stores.keys.file import KeyFile

S = "a-Secret_0123456789"

ADD_KEYS = f"""
import sys
from pathlib import Path
from gateway.stores.keys import io as keyio
path, who, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(count):
    with keyio.edit(path, create=True) as keys:
        keys.insert(f"{{who}}-{{number}}:{S}-{{who}}-{{number}}")
"""


def ids(path: Path) -> list[str]:
    return KeyFile(path.read_bytes()).ids


def add(path: Path, text: str, *, wait: float = 10.0) -> None:
    with keyio.edit(path, create=True, wait=wait) as keys:
        keys.insert(text)


def test_a_new_file_is_private_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "keys.txt"
    add(path, f"alice:{S}")
    assert path.stat().st_mode & 0o777 == 0o600
    assert ids(path) == ["alice"]
    assert path.read_text().startswith("# ")


def test_a_replaced_file_keeps_mode_owner_and_link(tmp_path: Path) -> None:
    real = tmp_path / "real.txt"
    real.write_text(f"alice:{S}\n")
    real.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(real, 1234, 4321)
    before = real.stat()
    link = tmp_path / "link.txt"
    link.symlink_to(real)
    add(link, f"bob:{S}b")
    after = real.stat()
    assert link.is_symlink()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert ids(real) == ["alice", "bob"]
    assert sorted(found.name for found in tmp_path.iterdir()) == ["link.txt", "real.txt"]


def test_an_edit_that_changes_nothing_or_fails_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(f"alice:{S}")
    before = keyio.signature(path.stat())
    with keyio.edit(path):
        pass
    with pytest.raises(KeyError), keyio.edit(path) as keys:
        keys.insert(f"bob:{S}b")
        raise KeyError
    assert keyio.signature(path.stat()) == before


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize(
    "after",
    [
        f"# c\nalice:{S}\nbob:{S}b\ncarol:{S}c\ndave:{S}d\n",
        f"# c\nalice:{S}\ncarol:{S}c\n",
        f"# c\nalice:{S}:60 tpm=5\nbob:{S}b\ncarol:{S}c\n",
        "",
    ],
)
def test_where_a_rename_fails_it_is_rewritten_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: str
) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(f"# c\nalice:{S}\nbob:{S}b\ncarol:{S}c\n")
    inode = path.stat().st_ino

    def refuse(self: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "replace", refuse)
    with keyio.edit(path) as keys:
        keys.lines = KeyFile(after.encode()).lines
    assert path.read_text() == after
    assert path.stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(f"alice:{S}\n")
    real_pwrite = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if len(data) > 5:
            return real_pwrite(fd, data[:5], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def busy(self: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"), keyio.edit(path) as keys:
        keys.remove(keys.lines[0])
        keys.insert(f"bob:{S}b and much more".replace(" ", "-"))
        keys.insert(f"carol:{S}c")
    assert path.read_text() == f"alice:{S}\n"


def test_any_other_failure_is_not_papered_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(f"alice:{S}\n")

    def fail(self: Path, target: Path) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="input/output"):
        add(path, f"bob:{S}b")
    assert path.read_text() == f"alice:{S}\n"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    writers = [subprocess.Popen([sys.executable, "-c", ADD_KEYS, path, f"w{n}", "15"]) for n in range(3)]
    assert [writer.wait(timeout=9) for writer in writers] == [0, 0, 0]
    assert sorted(ids(path)) == sorted(f"w{n}-{m}" for n in range(3) for m in range(15))


def test_a_writer_waits_for_the_lock_and_gives_up_in_time(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(f"alice:{S}\n")
    with path.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(keyio.KeyFileBusy):
            add(path, f"bob:{S}b", wait=0.05)
        writer = threading.Thread(target=add, args=(path, f"bob:{S}b"))
        writer.start()
    writer.join()
    assert ids(path) == ["alice", "bob"]


def test_a_lock_on_a_file_that_was_replaced_is_not_enough(tmp_path: Path) -> None:
    """Who waited on the old file must see what its new one says, or the other writer's key is lost."""
    path = tmp_path / "keys.txt"
    path.write_text(f"alice:{S}\n")
    with path.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer = threading.Thread(target=add, args=(path, f"carol:{S}c"))
        writer.start()
        replacement = tmp_path / "other"
        replacement.write_text(f"alice:{S}\nbob:{S}b\n")
        replacement.replace(path)
    writer.join()
    assert ids(path) == ["alice", "bob", "carol"]


def test_a_reader_does_not_see_what_a_writer_has_not_finished(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(f"alice:{S}\n")
    with path.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.truncate(3)
        with pytest.raises(keyio.KeyFileBusy):
            keyio.read(path, wait=0.05)


def test_without_locks_the_rename_has_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    path = tmp_path / "keys.txt"
    add(path, f"alice:{S}")
    assert b"alice" in keyio.read(path)[0]


def test_what_is_no_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="Docker"):
        keyio.read(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="no regular file"):
        keyio.read(fifo)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(keyio.MAX_BYTES + 1)
    with pytest.raises(OSError, match="more than"):
        keyio.read(large)


def can_mount() -> bool:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return False
    trial = (
        "mkdir /tmp/m-$$ && mount --bind /tmp/m-$$ /tmp/m-$$; code=$?; umount /tmp/m-$$; rmdir /tmp/m-$$; exit $code"
    )
    return subprocess.run(["unshare", "-m", "sh", "-c", trial], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount() and not os.environ.get("CI"), reason="needs root and the right to mount")
def test_a_real_bind_mount_and_a_writer_on_each_side(tmp_path: Path) -> None:
    outside, inside = tmp_path / "host.txt", tmp_path / "container" / "keys.txt"
    outside.write_text(f"# kept\nalice:{S}\n")
    outside.chmod(0o600)
    inside.parent.mkdir()
    inside.touch()
    inode = outside.stat().st_ino
    script = 'mount --bind "$1" "$2" && exec "$3" -c "$4" "$2" in 10'
    container = subprocess.Popen(
        ["unshare", "-m", "sh", "-ec", script, "sh", outside, inside, sys.executable, ADD_KEYS],
        stderr=subprocess.PIPE,
        text=True,
    )
    reads = []
    while container.poll() is None:
        reads.append(keyio.read(outside)[0])
    _, errors = container.communicate()
    assert (container.returncode, errors) == (0, "")
    assert outside.stat().st_ino == inode
    assert ids(outside) == ["alice", *(f"in-{n}" for n in range(10))]
    assert outside.read_text().startswith("# kept\n")
    assert [found.name for found in inside.parent.iterdir()] == ["keys.txt"]
    # each reading was whole: it only ever grows by whole lines
    assert all(data.startswith(b"# kept\nalice:") and data.endswith(b"\n") for data in reads)
