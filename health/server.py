"""The loop: one thread, one selector, thousands of connections; it decides nothing but who has to leave."""

from __future__ import annotations

import errno
import resource
import selectors
import socket
import time
from collections.abc import Callable

from health import answers, wire
from health.decide import Report, judge
from health.settings import Settings
from health.statefile import StateFile

BACKLOG = 4096
IDLE_SECONDS = 75.0  # without a complete request; longer than the 60 s for which load balancers keep a connection
MAX_CONNECTIONS = 4096  # the oldest leaves for a new one, so that nobody can make us large or deaf
SPARE_FILES = 16  # stay below the limit, or the state file itself could not be opened any more
MAX_UNSENT = 1 << 20  # of a stream whose reader is asleep
PAUSE_ANSWERING = 1 << 16  # of pipelined requests whose sender does not read
PARENT_SECONDS = 0.25
STREAM_SECONDS = 0.1
HEARTBEAT_SECONDS = 15.0
BIND_SECONDS = 3.0  # the server of the container's previous life may need a moment to notice that it has to go

OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Connection:
    """`closing`: ends when all is sent; `lingering`: all is sent, and what still comes in is thrown away."""

    __slots__ = ("active", "closing", "incoming", "lingering", "outgoing", "sock", "streaming")

    def __init__(self, sock: socket.socket, now: float) -> None:
        self.sock = sock
        self.active = now
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.closing = False
        self.lingering = False
        self.streaming = False


def listen(host: str, port: int) -> socket.socket:
    """Raises OSError when the address stays taken for BIND_SECONDS."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited by what it accepts
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    deadline = time.monotonic() + BIND_SECONDS
    while True:
        try:
            sock.bind((host, port))
            break
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                sock.close()
                raise
            time.sleep(0.1)
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def raise_file_limit() -> int:
    """How many connections we may hold."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, hard - SPARE_FILES))


class Server:
    def __init__(self, settings: Settings, listener: socket.socket, *, max_connections: int) -> None:
        self._settings = settings
        self._listener = listener
        self._max_connections = max_connections
        self._state = StateFile(settings.state_file)
        self._started = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._idle: dict[Connection, None] = {}  # ordered: whoever asked longest ago comes first
        self._streams: dict[Connection, None] = {}
        self._shown: Report | None = None  # what the streams were last told
        self._next_heartbeat = 0.0

    def run(self, orphaned: Callable[[], bool]) -> None:
        """Serves until `orphaned` says so; it is asked often enough to end within a second."""
        next_check = 0.0
        while True:
            for key, events in self._selector.select(STREAM_SECONDS if self._streams else PARENT_SECONDS):
                connection = key.data
                if connection is None:
                    self._accept()
                elif connection.sock.fileno() >= 0:  # it may have been dropped since the selector saw it
                    if events & selectors.EVENT_WRITE:
                        self._pump(connection)
                    else:
                        self._receive(connection)
            now = time.monotonic()
            if now >= next_check:
                next_check = now + PARENT_SECONDS
                if orphaned():
                    return
                self._expire(now)
            if self._streams:
                self._tell_streams(now)

    def close(self) -> None:
        for connection in [*self._idle, *self._streams]:
            self._drop(connection)
        self._selector.close()

    def _report(self) -> Report:
        published = self._state.read()
        return judge(
            published,
            now=time.monotonic(),  # after the reading: a heartbeat must not look as if it came from the future
            wall=time.time(),
            started=self._started,
            stale_after=self._settings.stale_after,
        )

    # -- connections: who comes, who leaves --

    def _accept(self) -> None:
        for _ in range(128):
            if len(self._idle) + len(self._streams) >= self._max_connections:
                self._drop_oldest()
            try:
                sock, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in OUT_OF_FILES:
                    continue  # that client has already left
                if not self._drop_oldest():
                    time.sleep(0.05)  # the whole machine is out of files: do not spin
                    return
                continue
            sock.setblocking(False)
            connection = Connection(sock, time.monotonic())
            self._idle[connection] = None
            self._selector.register(sock, selectors.EVENT_READ, connection)

    def _drop_oldest(self) -> bool:
        oldest = next(iter(self._idle), None) or next(iter(self._streams), None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

    def _drop(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        self._streams.pop(connection, None)
        self._selector.unregister(connection.sock)
        connection.sock.close()

    def _expire(self, now: float) -> None:
        while (oldest := next(iter(self._idle), None)) and now - oldest.active > IDLE_SECONDS:
            self._drop(oldest)

    # -- bytes in, bytes out --

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(16384)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)
            return
        if not data:
            self._drop(connection)
        elif not (connection.lingering or connection.streaming):
            connection.incoming += data
            self._pump(connection)

    def _pump(self, connection: Connection) -> None:
        """Answers and sends by turns, until no complete request is left or the client no longer reads."""
        while True:
            answered = self._answer_waiting(connection)
            if not self._flush(connection):
                return
            if not answered:
                break
        if connection.closing and not connection.lingering:
            # Closing at once, with bytes of the client unread, would reset the connection under the answer.
            connection.lingering = True
            try:
                connection.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._drop(connection)

    def _answer_waiting(self, connection: Connection) -> bool:
        """Answers the complete requests in the buffer; False if there was none."""
        answered = False
        while len(connection.outgoing) < PAUSE_ANSWERING and not (connection.closing or connection.streaming):
            try:
                request = wire.take(connection.incoming)
            except wire.Refused as refused:
                connection.outgoing += answers.refusal(refused)
                connection.closing = True
                return True
            if request is None:
                break
            self._answer(connection, request)
            answered = True
        return answered

    def _answer(self, connection: Connection, request: wire.Request) -> None:
        report = self._report()
        self._idle.pop(connection)
        if answers.is_stream(request) and request.method == "GET":
            connection.streaming = True
            connection.outgoing += wire.stream_head() + answers.full_status(report)
            if not self._streams:
                self._shown = report
                self._next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
            self._streams[connection] = None
            return
        connection.active = time.monotonic()
        self._idle[connection] = None
        connection.outgoing += answers.answer(request, report, liveness=self._settings.liveness)
        connection.closing = request.last or answers.is_stream(request)

    def _flush(self, connection: Connection) -> bool:
        """True when nothing is left to send."""
        if connection.outgoing:
            try:
                del connection.outgoing[: connection.sock.send(connection.outgoing)]
            except BlockingIOError:
                pass
            except OSError:
                self._drop(connection)
                return False
        self._watch(connection, selectors.EVENT_WRITE if connection.outgoing else selectors.EVENT_READ)
        return not connection.outgoing

    def _watch(self, connection: Connection, events: int) -> None:
        if self._selector.get_key(connection.sock).events != events:
            self._selector.modify(connection.sock, events, connection)

    # -- streams --

    def _tell_streams(self, now: float) -> None:
        report = self._report()
        news = answers.changes(self._shown, report) if self._shown is not None else answers.full_status(report)
        self._shown = report
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + HEARTBEAT_SECONDS
            news += answers.HEARTBEAT
        if not news:
            return
        for connection in list(self._streams):
            if len(connection.outgoing) > MAX_UNSENT:
                self._drop(connection)
            else:
                connection.outgoing += news
                self._flush(connection)
