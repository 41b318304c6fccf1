"""Log files and stderr, written by one thread so that no request waits for a disk; secrets are masked on the way.

Files are `YYYYmmdd_HHMMSS_<kind>_<instance>.log` in `$DATA_DIR/logs/<LOG_NAME>[-<WORKER_TYPE>]/`, with `latest.txt`
naming the newest of each kind.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import re
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

MAX_FILE_BYTES = 50 * 1024 * 1024
MAX_FILE_SECONDS = 86_400.0  # a file is written for a day at most
MAX_AGE_SECONDS = 14 * 86_400
KEEP_FILES = 20  # of each kind
BATCH_SECONDS = 0.05
MAX_BATCH = 1000
LIVE_SECONDS = 3600.0  # another instance's file that was written so recently is in use

_SECRET = re.compile(r"sk-[A-Za-z0-9_-]+-[A-Za-z0-9_-]{43}|(?<=Bearer )[^\s\"']+")


_ABOUT = ("request_id", "key_id", "model")


class LateRecord(logging.LogRecord, ABC):
    """Put into words by the thread that writes it; a usual record costs whoever logs ten times as much.

    A subclass has `name`, and sets `created`; other handlers than ours find the rest once they ask for the message.
    """

    levelno, levelname, exc_info = logging.INFO, "INFO", None

    @abstractmethod
    def words(self) -> str:
        """The message."""

    def getMessage(self) -> str:
        usual = logging.LogRecord(self.name, self.levelno, __file__, 0, "", (), None, "close").__dict__
        self.__dict__ |= {name: value for name, value in usual.items() if name not in self.__dict__}
        return self.words()


class LogFile:
    """One rotated file of one kind. A disk that refuses is counted and tried again a minute later."""

    def __init__(self, folder: Path, kind: str, instance: str) -> None:
        self.folder, self.kind, self.instance = folder, kind, instance
        self.errors = 0  # entries that could not be kept
        self.problem: str | None = None  # why none can be kept now
        self._stream: IO[bytes] | None = None
        self._bytes = 0
        self._until = 0.0
        self._retry_at = 0.0

    def write(self, data: bytes, entries: int = 1) -> bool:
        """False where these entries could not be kept."""
        now = time.monotonic()
        if self._stream is None and now < self._retry_at:
            self.errors += entries
            return False
        try:
            if self._stream is None or self._bytes > MAX_FILE_BYTES or now > self._until:
                self._open()
                self._until = now + MAX_FILE_SECONDS
            assert self._stream is not None
            self._stream.write(data)
            self._stream.flush()
        except OSError as error:
            self.problem = error.strerror or type(error).__name__
            self.errors += entries
            self._retry_at = now + 60
            self.close()
            return False
        self._bytes += len(data)
        self.problem = None
        return True

    def close(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None

    def _open(self) -> None:
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.strftime('%Y%m%d_%H%M%S')}_{self.kind}_{self.instance}.log"
        path = self.folder / name
        self._stream = path.open("ab")
        self._bytes = path.stat().st_size
        with contextlib.suppress(OSError):  # that is no reason not to write
            self._note_latest(name)
            self._tidy(path)

    def _tidy(self, current: Path) -> None:
        """Remove old files, but none that another instance on the same volume may still be writing."""
        files = sorted(self.folder.glob(f"????????_??????_{self.kind}_*.log"))
        for index, old in enumerate(files):
            idle = time.time() - old.stat().st_mtime
            ours = old.name.endswith(f"_{self.kind}_{self.instance}.log")
            surplus = len(files) - index > KEEP_FILES and (ours or idle > LIVE_SECONDS)
            if old != current and (surplus or idle > MAX_AGE_SECONDS):
                old.unlink(missing_ok=True)

    def _note_latest(self, name: str) -> None:
        latest = self.folder / "latest.txt"
        lines = latest.read_text(errors="replace").splitlines() if latest.is_file() else []
        others = [line for line in lines if not line[15:].startswith(f"_{self.kind}_")]
        latest.write_text("\n".join([*others, name]) + "\n")


class LogWriter(threading.Thread):
    """Formats and writes. `put` never blocks; beyond 10,000 waiting entries it drops and counts."""

    def __init__(self, folder: Path, instance: str, as_json: bool, secrets: list[str]) -> None:
        super().__init__(name="log writer", daemon=True)
        self.dropped = 0
        self._queue: queue.SimpleQueue[logging.LogRecord | bytes | None] = queue.SimpleQueue()
        self._as_json = as_json
        self._secrets = secrets
        self._gateway = LogFile(folder, "gateway", instance)
        self._server = LogFile(folder, "server", instance)

    @property
    def errors(self) -> int:
        """Entries that no file could take."""
        return self._gateway.errors + self._server.errors + self.dropped

    def put(self, entry: logging.LogRecord | bytes) -> None:
        """A record goes to stderr and the gateway's file; bytes are a llama-server's own output."""
        if self._queue.qsize() > 10_000:
            self.dropped += 1
        else:
            self._queue.put(entry)

    def add_secret(self, secret: str) -> None:
        self._secrets.append(secret)

    def run(self) -> None:
        ended = False
        while not ended:
            batch = self._batch()
            ended = None in batch
            lines = [self._line(entry) for entry in batch if isinstance(entry, logging.LogRecord)]
            if lines:
                text = self.mask("".join(lines))
                _say(text)
                self._keep(self._gateway, text.encode(errors="replace"), len(lines))
            output = [entry for entry in batch if isinstance(entry, bytes)]
            if output:
                text = self.mask(b"".join(output).decode(errors="replace"))
                self._keep(self._server, text.encode(), len(output))
        self._gateway.close()
        self._server.close()

    def _keep(self, file: LogFile, data: bytes, entries: int) -> None:
        """Where a disk begins to refuse, stderr is told once."""
        before = file.problem
        if not file.write(data, entries) and before is None:
            message = f"no {file.kind} log is written in {file.folder}, the service goes on: {file.problem}"
            _say(self._line(logging.LogRecord("corral.logs", logging.ERROR, __file__, 0, message, None, None)))

    def _batch(self) -> list[logging.LogRecord | bytes | None]:
        """What is there, and what comes within a moment: one write for many lines, and few wake-ups under load."""
        batch = [self._queue.get()]
        if batch[0] is not None:
            time.sleep(BATCH_SECONDS)
        with contextlib.suppress(queue.Empty):
            while len(batch) < MAX_BATCH and batch[-1] is not None:
                batch.append(self._queue.get_nowait())
        return batch

    def _line(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record) + "\n"
        except Exception as error:  # one bad call must not end the log of all others
            where = f"{record.pathname}:{record.lineno}"
            return f"{_stamp(record.created)} ERROR   {where}: this entry cannot be formatted: {type(error).__name__}\n"

    def stop(self) -> None:
        self._queue.put(None)
        self.join(timeout=5)

    def mask(self, text: str) -> str:
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, "***")
        return _SECRET.sub("***", text) if "sk-" in text or "Bearer " in text else text

    def format(self, record: logging.LogRecord) -> str:
        message = record.words() if isinstance(record, LateRecord) else record.getMessage()
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        about = {name: value for name in _ABOUT if (value := getattr(record, name, None))}
        if self._as_json:
            row: dict[str, Any] = {"time": _stamp(record.created), "level": record.levelname.lower()}
            row |= {"request_id": None, "key_id": None, "model": None} | about
            message += f"\n{trace}" if trace else ""
            return json.dumps(row | {"logger": record.name, "message": message}, ensure_ascii=False)
        tail = "".join([f" {name}={value}" for name, value in about.items()])
        line = _one_line(f"{_stamp(record.created)} {record.levelname:<7} {message}{tail}")
        return "\n    ".join([line, *map(_one_line, trace.splitlines())]) if trace else line


class _Handler(logging.Handler):
    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        self._writer.put(record)

    def handle(self, record: logging.LogRecord) -> bool:
        """Without logging's lock and filters: the queue behind it needs neither."""
        self._writer.put(record)
        return True


@contextlib.contextmanager
def logging_to(folder: Path, instance: str, *, level: str, as_json: bool, secrets: list[str]) -> Iterator[LogWriter]:
    """Send the root logger through a LogWriter for as long as the block runs."""
    writer = LogWriter(folder, instance, as_json, secrets)
    handler = _Handler(writer)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    writer.start()
    try:
        yield writer
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
        writer.stop()


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def log_folder(data_dir: Path, log_name: str, worker_type: str | None) -> Path:
    return data_dir / "logs" / (f"{log_name}-{worker_type}" if worker_type else log_name)


def _stamp(created: float) -> str:
    return f"{_second(int(created))}.{int(created % 1 * 1000):03d}Z"


@lru_cache(maxsize=4)
def _second(created: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created))


def _one_line(text: str) -> str:
    """A client's text must not forge a second line, nor steer a terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
