"""Ports of 127.0.0.1, one for each llama-server, and whether it is that one which answers there."""

from __future__ import annotations

import asyncio
import random
import socket
from typing import cast
from urllib.parse import urlsplit

from gateway.backend import Backend
from gateway.errors import BackendError, BackendTimeout
from gateway.models.listeners import who_listens

# Below those that Linux gives to outgoing connections and to whoever does not mind which (ip_local_port_range, from
# 32768 on): a server that is being started does not listen yet, and its port must not be anybody else's meanwhile.
FURTHER = range(20_000, 32_000)
_TRIES = 64
_SECONDS = 5.0
_REFUSED = (401, 403)


class Stranger(Exception):
    """Another program answers where a llama-server of ours should; the text is a sentence."""


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
        first = () if self._preferred is None else (self._preferred,)
        for wanted in (*first, *random.sample(FURTHER, _TRIES), *[0] * _TRIES):
            port = None if wanted in self._taken else _bindable(wanted)
            if port and port not in self._taken:
                self._taken.add(port)
                return port
        raise OSError("no free port on 127.0.0.1")

    def give_back(self, port: int) -> None:
        self._taken.discard(port)


async def answers(backend: Backend, pid: int) -> bool:
    """Whether the llama-server that was started as process `pid` is up.

    Raises Stranger if it is another program that answers. All tell everybody that they are well. One that asks for a
    key does not take that of this start. One that asks for none is known by who listens, and by that alone only where
    ours listens as well: a wrapper may have somebody else run it, and a build may know no keys.
    """
    try:
        status, _ = await backend.get("/health", _SECONDS)
        if status != 200:
            return False
        status, _ = await backend.get("/props", _SECONDS)
        strange = status in _REFUSED
        if not strange:
            ours, others = await asyncio.to_thread(who_listens, urlsplit(backend.url).port or 0, pid)
            strange = others and (ours or await _asks_for_no_key(backend.url))
    except (BackendError, BackendTimeout):
        return False  # it does not listen yet
    if strange:
        raise Stranger(f"another program answers at {backend.url}, where this llama-server should")
    return True


async def _asks_for_no_key(url: str) -> bool:
    nobody = Backend(url)
    try:
        status, _ = await nobody.get("/props", _SECONDS)
    finally:
        nobody.close()
    return status not in _REFUSED


def _bindable(port: int) -> int | None:
    """The port, or any for 0, if nobody listens on it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return None
        return cast(int, probe.getsockname()[1])
