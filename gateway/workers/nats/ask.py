"""The other side of the NATS door: one job is sent, and its answer awaited."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client

from gateway.workers.nats.layout import CANCEL_SUBJECT
from gateway.workers.nats.link import CALL_SECONDS, CLOSE_SECONDS, CONNECT_SECONDS, RETRY_SECONDS, Away, reaching


async def ask(
    servers: list[str],
    creds: Path | None,
    subject: str,
    job: dict[str, Any],
    silence: float,
    take: Callable[[str], None],
) -> dict[str, Any]:
    """The answer to `job`, which has a `req_id`; `take` gets its tokens before that. When cancelled, the job is too.

    `silence` in seconds bounds each wait. Raises Away.
    """
    client = Client()
    try:
        await _connect(client, servers, creds)
        with reaching():
            inbox = client.new_inbox()
            answers = await client.subscribe(inbox)
            await _send(client, subject, msgspec.json.encode(job | {"reply_to": inbox}))
        try:
            return await _answer(answers.next_msg, silence, take)
        except asyncio.CancelledError:
            with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
                await client.publish(CANCEL_SUBJECT + job["req_id"])
                await client.flush(int(CLOSE_SECONDS))
            raise
    finally:
        with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await client.close()


async def _connect(client: Client, servers: list[str], creds: Path | None) -> None:
    problems: list[Exception] = []

    async def failed(error: Exception) -> None:
        problems.append(error)

    try:
        await client.connect(
            servers,
            name="corral chat",
            user_credentials=str(creds) if creds else None,
            allow_reconnect=False,
            max_reconnect_attempts=1,  # or it tries for two minutes
            reconnect_time_wait=RETRY_SECONDS,  # type: ignore[arg-type]  # it only sleeps for so long
            connect_timeout=CONNECT_SECONDS,
            error_cb=failed,
        )
    except (nats.errors.Error, OSError, TimeoutError) as error:
        about = problems[-1] if problems else error
        raise Away(str(about) or type(about).__name__) from None


async def _send(client: Client, subject: str, data: bytes) -> None:
    try:
        await client.jetstream(timeout=CALL_SECONDS).publish(subject, data)
    except (nats.js.errors.NoStreamResponseError, nats.errors.NoRespondersError):
        raise Away(f"no queue takes {subject}: no worker has ever been there; is the subject right?") from None
    except nats.errors.MaxPayloadError:
        raise Away(f"the job is larger than the {client.max_payload} bytes that the server takes") from None


async def _answer(next_message: Callable[..., Any], silence: float, take: Callable[[str], None]) -> dict[str, Any]:
    shown = 0
    while True:
        try:
            message = await next_message(timeout=silence)
        except (TimeoutError, nats.errors.TimeoutError):
            raise Away(f"no answer for {silence:g} s: does a worker serve that model?") from None
        except nats.errors.Error as error:
            raise Away(str(error) or type(error).__name__) from error
        try:
            told = msgspec.json.decode(message.data, type=dict[str, Any])
        except msgspec.DecodeError:
            raise Away("an answer came that is none of a worker's") from None
        if "token" not in told:
            return told
        index = told.get("index")
        if not isinstance(index, int) or index >= shown:  # a job that is delivered again begins from its first token
            take(str(told["token"]))
            shown = index + 1 if isinstance(index, int) else shown
