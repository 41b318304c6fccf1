"""What workers remember together, in one JetStream bucket: finished answers, and tries that did not finish."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import nats.js.errors
from nats.js.kv import KeyValue

from gateway.pipeline.call import Fields
from gateway.workers.jobs import Attempts, attempts_in
from gateway.workers.nats.link import reaching

_WAYS = frozenset({"reply_to", "trace_id"})  # how a job is sent, not what it is


def answer_key(model_id: str, req_id: str, fields: Fields) -> str:
    """Of a job's answer: a job that is sent again has the same one, another job under the same id has not."""
    digest = hashlib.blake2b(digest_size=20)
    for part in _parts(model_id, req_id, fields):
        digest.update(len(part).to_bytes(8, "big") + part)
    return f"answer.{digest.hexdigest()}"


def _parts(model_id: str, req_id: str, fields: Fields) -> Iterable[bytes]:
    yield model_id.encode()
    yield req_id.encode()
    for name in sorted(fields):
        if name not in _WAYS:
            yield name.encode()
            yield bytes(fields[name])


class Store:
    """Each call is a round trip, and raises Away."""

    def __init__(self, bucket: KeyValue) -> None:
        self._bucket = bucket

    async def answer(self, key: str) -> bytes | None:
        return await self._get(key)

    async def keep_answer(self, key: str, body: bytes) -> bytes:
        """The answer that counts: this one, unless another worker was first."""
        with reaching():
            try:
                await self._bucket.create(key, body)
                return body
            except nats.js.errors.KeyWrongLastSequenceError:
                pass
        return await self._get(key) or body

    async def claim(self, key: str, owner: str) -> str:
        """Who has it: `owner`, unless somebody else was first."""
        return (await self.keep_answer(key, owner.encode())).decode()

    async def attempts(self, key: str) -> Attempts:
        return attempts_in(await self._get(key))

    async def keep_attempts(self, key: str, attempts: Attempts) -> None:
        with reaching():
            await self._bucket.put(key, attempts.encode())

    async def _get(self, key: str) -> bytes | None:
        with reaching():
            try:
                return (await self._bucket.get(key)).value
            except nats.js.errors.KeyNotFoundError:
                return None
