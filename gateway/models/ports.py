"""Ports of 127.0.0.1, one for each llama-server."""

from __future__ import annotations

import socket
from typing import cast


class Ports:
    """Ports of 127.0.0.1 for llama-servers: one is nobody else's from `take` to `give_back`.

    Two servers that start at once would else be given the same one, for neither listens yet; and llama-server shares
    its port with another of its kind without a word.
    """

    def __init__(self, preferred: int | None = None) -> None:
        self._preferred = preferred
        self._taken: set[int] = set()

    def take(self) -> int:
        """The preferred port if nobody has it, else any. Raises OSError where there is none."""
        for _ in range(64):
            wanted = 0 if self._preferred is None or self._preferred in self._taken else self._preferred
            port = _bindable(wanted) or _bindable(0)
            if port and port not in self._taken:
                self._taken.add(port)
                return port
        raise OSError("no free port on 127.0.0.1")

    def give_back(self, port: int) -> None:
        self._taken.discard(port)


def _bindable(port: int) -> int | None:
    """The port, or any for 0, if nobody listens on it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return None
        return cast(int, probe.getsockname()[1])
