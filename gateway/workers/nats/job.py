"""A job as it was delivered, and the call that it amounts to."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from nats.aio.msg import Msg

from gateway.errors import BadRequest, CorralError, PayloadTooLarge
from gateway.pipeline.call import Call, Fields, parse_json_object
from gateway.pipeline.identity import identity
from gateway.pipeline.plain import Plain, fill_call, plain_job, template_of, trace_of
from gateway.pipeline.routes import max_wait, priority
from gateway.stores.keys.file import Key

_TRIES = "tries."
MOST_ID_CHARACTERS = 256
MOST_SUBJECT_CHARACTERS = 512
_SUBJECT = re.compile(r"(?!\$)[!-)+-\-/-=?-~]+(\.[!-)+-\-/-=?-~]+)*")  # ASCII that one sees, but for * and >
_OURS = ("inference.request.", "inference.dead.", "inference.cancel.")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it was delivered to us. Times are unix seconds."""

    ack: str  # the subject that takes our word on it
    data: bytes
    headers: Mapping[str, str]
    deliveries: int  # this one included
    sequence: int  # in the stream
    key: str  # of what is written down about it
    fallback_id: str  # for a job that brings none
    published: float

    @classmethod
    def of(cls, message: Msg) -> Delivery:
        about = message.metadata
        name = f"{about.sequence.stream}-{int(about.timestamp.timestamp() * 1e6):x}"
        return cls(
            ack=message.reply,
            data=message.data,
            headers=message.headers or {},
            deliveries=about.num_delivered,
            sequence=about.sequence.stream,
            key=f"{_TRIES}{name}",
            fallback_id=f"job-{name}",
            published=about.timestamp.timestamp(),
        )

    @staticmethod
    def sequence_in(key: str) -> int:
        """Of the message that has this key."""
        return int(key.removeprefix(_TRIES).partition("-")[0])


@dataclass(eq=False, slots=True)
class InHand:
    """A job that this worker has, from its delivery to the last word on it."""

    delivery: Delivery
    model: str
    req_id: str  # as the job's sender named it
    ack_wait: float  # seconds of silence after which another worker gets it
    progress_due: float = 0.0  # on the monotonic clock
    reply_to: str | None = None
    call: Call | None = None
    run: asyncio.Task[bytes] | None = None
    crowded: bool = False  # another job waits here already, and another worker may have a place
    cut: bool = False
    cancelled: bool = False  # by whom it belongs to
    begun_at: float = field(default_factory=time.monotonic)

    def stop(self) -> None:
        self.cut = True
        if self.run is not None:
            self.run.cancel()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun_at

    @property
    def placed(self) -> bool:
        """Whether it has had its place in the model's queue; before that it waits, or was refused."""
        return self.call is not None and any(name == "x-queue-time-ms" for name, _ in self.call.headers_out)


@dataclass(frozen=True, slots=True)
class Job:
    """What a payload asks for."""

    plain: Plain
    fields: Fields
    named: bool  # it brought its own id


def names_in(data: bytes) -> tuple[str | None, str | None]:
    """A job's own id and where its answer goes, as far as they can be used, also where the job itself cannot be."""
    try:
        fields = parse_json_object(data)
    except CorralError:
        return None, None
    own, reply_to = _text(fields, "req_id"), _text(fields, "reply_to")
    if own is not None and len(own) > MOST_ID_CHARACTERS:
        own = None
    return own, reply_to if reply_to and is_reply_subject(reply_to) else None


def _text(fields: Fields, name: str) -> str | None:
    try:
        return msgspec.json.decode(fields[name], type=str) or None
    except (KeyError, msgspec.DecodeError, RecursionError):
        return None


def read_job(delivery: Delivery, most_bytes: int) -> Job:
    """Raises BadRequest, InvalidJSON, PayloadTooLarge."""
    if len(delivery.data) > most_bytes:
        raise PayloadTooLarge(f"the job is larger than the {most_bytes} bytes of MAX_REQUEST_BODY_SIZE")
    fields = parse_json_object(delivery.data)
    plain = plain_job(fields)
    if plain.reply_to and not is_reply_subject(plain.reply_to):
        raise BadRequest(f"reply_to is {plain.reply_to[:100]!r}: must be a subject for answers", param="reply_to")
    return Job(plain, fields, names_in(delivery.data)[0] is not None)


def route_of(data: bytes) -> str:
    """The route of a job that is wrong, as far as it can be told: one of ROUTES, or empty."""
    try:
        fields = parse_json_object(data)
    except CorralError:
        return ""
    return template_of(name for name, value in fields.items() if bytes(value) != b"null")


def is_reply_subject(subject: str) -> bool:
    """No job may make its worker say something to NATS itself, or to other workers."""
    if len(subject) > MOST_SUBJECT_CHARACTERS or subject.startswith(_OURS):
        return False
    return _SUBJECT.fullmatch(subject) is not None


def call_for(job: Job, delivery: Delivery, key: Key, model_id: str, *, stream: bool) -> Call:
    """Raises BadRequest."""
    request_id, traceparent = identity(job.plain.req_id or delivery.fallback_id, delivery.headers.get("traceparent"))
    if job.plain.trace_id is not None:
        traceparent = trace_of(job.plain.trace_id, traceparent)
    call = Call(
        route=job.plain.route(),
        key=key,
        caller=key.id,
        request_id=request_id,
        traceparent=traceparent,
        received_at=asyncio.get_running_loop().time(),
        model=None,
        fields={},
        size=len(delivery.data),
        transport="nats",
    )
    fill_call(call, job.plain, stream=stream)
    call.model = model_id  # by the subject, whatever the body says
    if "X-Request-Priority" in delivery.headers:
        call.priority = priority(delivery.headers["X-Request-Priority"])
    if "X-Request-Timeout" in delivery.headers:
        call.max_wait = max_wait(delivery.headers["X-Request-Timeout"])
    return call
