"""Answers to prompts that mean the same: who asks the embedding model, and what must agree beside the meaning."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec

from gateway.admission.queue import Queue, Ticket
from gateway.backend import Backend
from gateway.errors import CorralError
from gateway.models.manager import Manager
from gateway.pipeline.cache.key import Request
from gateway.pipeline.call import Call
from gateway.pipeline.dialects import Dialect
from gateway.stores.cache.vectors import Meanings, Near
from gateway.stores.cache.wording import gist

log = logging.getLogger("corral.cache")

LOOK_SECONDS = 1.0  # for a vector, while a client waits
KEEP_SECONDS = 60.0  # for one, when its answer has been given: the embedding model may have to be loaded
MOST_KEEPING = 32
LOADING_SECONDS = 0.05  # between two looks at a load
MOST_REPLY = 1 << 20

_TOOLS = ("tools", "functions", "tool_choice", "function_call")


@dataclass(frozen=True, slots=True)
class Vector:
    """`space` names the model that made it: vectors of different ones cannot be compared."""

    space: str
    values: Sequence[float]


class Embed(Protocol):
    async def __call__(self, text: str, seconds: float) -> Vector | None:
        """A text's vector within so many seconds; None where it is not to be had."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Sought:
    """What a prompt is looked up by. `kin` are those that it may be compared with."""

    text: str
    kin: str
    vector: Vector | None


class Meaning:
    def __init__(self, name: str, embed: Embed, index: Meanings, similarity: float) -> None:
        self._name, self._embed, self._index, self._similarity = name, embed, index, similarity
        self._keeping: dict[str, asyncio.Task[None]] = {}  # by kin: vectors that are still being made

    async def sought(self, request: Request, call: Call, about: Sequence[str]) -> Sought | None:
        """None where the request is none whose meaning can be told. `about` is all else that must agree."""
        plain = plain_question(request, call.route.dialect)
        if plain is None:
            return None
        text, words, rest = plain
        kin = replace(request, fields=rest).key("meaning", *about, *words)
        until = asyncio.get_running_loop().time() + LOOK_SECONDS
        vector = await self._embed(text, LOOK_SECONDS)
        if vector is not None and (keeping := self._keeping.get(kin)) is not None:  # it may be the very one
            await asyncio.wait((keeping,), timeout=max(0.0, until - asyncio.get_running_loop().time()))
        return Sought(text, kin, vector)

    async def nearest(self, sought: Sought) -> str | None:
        """The key of the answer to the nearest prompt, if it is near enough."""
        vector = sought.vector
        if vector is None:
            return None
        near: Near | None = await self._index.nearest(f"{sought.kin} {vector.space}", vector.values)
        return near.key if near is not None and near.similarity >= self._similarity else None

    def keep(self, sought: Sought, key: str) -> None:
        """The answer is there under `key`. Returns at once."""
        if sought.vector is not None:
            self._index.keep(f"{sought.kin} {sought.vector.space}", sought.vector.values, key)
        elif len(self._keeping) < MOST_KEEPING and sought.kin not in self._keeping:
            task = asyncio.create_task(self._keep_later(sought, key), name="embed a prompt")
            self._keeping[sought.kin] = task
            task.add_done_callback(lambda _: self._keeping.pop(sought.kin, None))

    async def _keep_later(self, sought: Sought, key: str) -> None:
        vector = await self._embed(sought.text, KEEP_SECONDS)
        if vector is not None:
            self._index.keep(f"{sought.kin} {vector.space}", vector.values, key)

    async def clear(self) -> None:
        for task in self._keeping.values():
            task.cancel()
        await self._index.clear()

    def facts(self) -> dict[str, Any]:
        return {"model": self._name, "similarity": self._similarity, "entries": self._index.entries}

    async def close(self) -> None:
        keeping = list(self._keeping.values())
        for task in keeping:
            task.cancel()
        if keeping:
            await asyncio.wait(keeping)
        self._embed.close()
        await self._index.close()


def plain_question(request: Request, dialect: Dialect) -> tuple[str, tuple[str, ...], dict[str, Any]] | None:
    """The last message's text, its gist, and the request without it; None for all but text that a user says last."""
    fields = request.fields
    messages = fields.get("messages")
    if dialect is not Dialect.CHAT or any(fields.get(name) for name in _TOOLS):
        return None
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        return None
    if any(not isinstance(one.get("content"), str) or one.keys() - {"role", "content"} for one in messages):
        return None
    last = messages[-1]
    words = gist(last["content"]) if last.get("role") == "user" else None
    if words is None:
        return None
    rest = {**fields, "messages": [*messages[:-1], {"role": "user"}]}
    return last["content"], words, rest


class HerdEmbedder:
    """A model of the herd is asked, as any job is; nothing is recorded, for no client has asked.

    It is loaded where that evicts nobody: a model that answers is worth more than a guess what was answered.
    """

    def __init__(self, manager: Manager, queues: Mapping[str, Queue], model_id: str) -> None:
        self._manager, self._queues, self._id = manager, queues, model_id
        self._told: str | None = None  # what was logged last

    async def __call__(self, text: str, seconds: float) -> Vector | None:
        try:
            async with asyncio.timeout(seconds):
                return await self._vector(text, seconds)
        except (CorralError, TimeoutError) as error:
            log.debug("no vector of %s: %s", self._id, error)
            return None

    async def load(self) -> bool:
        """Ask for it, unless it is loaded, or somebody would have to go for it; whether it may be waited for."""
        owner = self._manager.owners.get(self._id)
        if owner is None or self._id not in self._queues:
            return False  # a reload has taken it away
        if owner.backend is None and owner.spec.url is None:
            plan = await self._manager.plan(self._id)
            if plan.evict or plan.blocked_by or not plan.fits:
                self._tell(f"{self._id} is not loaded for the semantic cache: {plan.reason}")
                return False
            owner.load()
        return True

    async def _vector(self, text: str, seconds: float) -> Vector | None:
        deadline = asyncio.get_running_loop().time() + seconds
        if not await self._loaded():
            return None
        async with self._queues[self._id].place(Ticket("the cache", 1, len(text), deadline, priority="high")):
            owner = self._manager.owners.get(self._id)
            if owner is None or owner.backend is None:
                return None  # a lease would load it, whoever has to go for it
            async with self._manager.lease(self._id) as lease:
                values = await vector_of(await lease.backend(deadline), text)
                space = owner.started_as
        if not values:
            self._tell(f"{self._id} gives no vectors: the semantic cache needs an embedding model")
        return Vector(f"{self._id} {space}", values) if values and space else None

    async def _loaded(self) -> bool:
        """Whether it has been loaded; to be bounded by who waits for it."""
        while await self.load():
            if self._manager.owners[self._id].backend is not None:
                return True
            await asyncio.sleep(LOADING_SECONDS)
        return False

    def _tell(self, what: str) -> None:
        if what != self._told:
            self._told = what
            log.warning("%s", what)

    def close(self) -> None:
        return  # the model is the manager's


class RemoteEmbedder:
    """A server by its address."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def __call__(self, text: str, seconds: float) -> Vector | None:
        try:
            async with asyncio.timeout(seconds):
                values = await vector_of(self._backend, text)
        except (CorralError, TimeoutError) as error:
            log.debug("no vector of %s: %s", self._backend, error)
            return None
        return Vector(self._backend.url, values) if values else None

    def close(self) -> None:
        self._backend.close()


async def vector_of(backend: Backend, text: str) -> list[float] | None:
    """Raises BackendGone, BackendTimeout, BackendError."""
    reply = await backend.request("POST", "/v1/embeddings", msgspec.json.encode({"input": text}))
    body = await reply.read(MOST_REPLY)
    try:
        values = msgspec.json.decode(body)["data"][0]["embedding"]
        return [float(value) for value in values] if reply.status == 200 else None
    except (msgspec.DecodeError, LookupError, TypeError, ValueError):
        return None
