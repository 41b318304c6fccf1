"""Whose process listens on a port, as /proc tells it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.models import listeners
from gateway.models.listeners import who_listens

LISTEN = """
import os, socket, sys, time
with socket.socket() as server:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind(("127.0.0.1", int(sys.argv[1])))
    server.listen()
    print(server.getsockname()[1], os.getpid(), flush=True)
    time.sleep(60)
"""
WAYS = {"itself": ["env"], "a child": ["sh", "-c", '"$@"; exit', "sh"], "a session": ["setsid", "-w"]}


@contextlib.contextmanager
def listening(port: int = 0, way: str = "itself") -> Iterator[tuple[int, int]]:
    """The port, and the process that was started; in one of these ways that or one of its own listens."""
    command = [*WAYS[way], sys.executable, "-c", LISTEN, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        port, listener = map(int, process.stdout.readline().split())
        try:
            yield port, process.pid
        finally:
            os.kill(listener, signal.SIGKILL)


@pytest.mark.parametrize("way", WAYS)
def test_a_process_or_one_that_it_has_started(way: str) -> None:
    with listening(way=way) as (port, pid):
        assert who_listens(port, pid) == (True, False)
        with listening() as (_, other):
            assert who_listens(port, other) == (False, True)


def test_a_port_that_two_share() -> None:
    with listening() as (port, ours), listening(port) as (_, theirs):
        assert who_listens(port, ours) == who_listens(port, theirs) == (True, True)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_one_that_listens_on_all_addresses_counts_where_no_other_does(host: str) -> None:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        assert who_listens(server.getsockname()[1], os.getpid()) == (True, False)
    with listening() as (port, ours), socket.socket() as everywhere:
        everywhere.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        everywhere.bind(("0.0.0.0", port))
        everywhere.listen()
        assert who_listens(port, ours) == (True, False)


def test_where_nothing_can_be_seen_nobody_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with listening() as (port, pid):
        monkeypatch.setattr(listeners, "_has_open", lambda *_: False)  # as with processes of another user
        assert who_listens(port, pid) == (False, False)
        monkeypatch.setattr(listeners, "_PROC", tmp_path)
        assert who_listens(port, pid) == (False, False)
    assert who_listens(1, pid) == (False, False)
