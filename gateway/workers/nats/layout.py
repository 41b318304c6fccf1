"""What Corral keeps in JetStream: streams, a consumer for each model, and a bucket; made where they are missing.

What is there already stays as it is, so that an operator can choose replicas, sizes, and how long things are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    KeyValueConfig,
    RetentionPolicy,
    StreamConfig,
)
from nats.js.kv import KeyValue

from gateway.workers.nats.link import Away, reaching

JOBS = "INFERENCE"
DEAD = "INFERENCE_DEAD"
CANCELLED = "INFERENCE_CANCEL"
BUCKET = "inference_jobs"
REQUEST_SUBJECT = "inference.request."
DEAD_SUBJECT = "inference.dead."
CANCEL_SUBJECT = "inference.cancel."

ACK_WAIT = 15.0  # seconds until a job whose worker says nothing is delivered again
REMEMBERED_SECONDS = 86_400.0  # answers, and what was written down of tries
CANCEL_SECONDS = 3_600.0

_STREAMS = (
    StreamConfig(
        name=JOBS,
        description="jobs for models; each is gone when it is answered",
        subjects=[f"{REQUEST_SUBJECT}*"],
        retention=RetentionPolicy.WORK_QUEUE,
    ),
    StreamConfig(name=DEAD, description="jobs that were given up, with the reason", subjects=[f"{DEAD_SUBJECT}*"]),
    StreamConfig(
        name=CANCELLED,
        description="which jobs are not wanted any more",
        subjects=[f"{CANCEL_SUBJECT}>"],
        max_age=CANCEL_SECONDS,
        max_msgs_per_subject=1,
        max_msgs=100_000,
    ),
)


Warn = Callable[[str], None]


async def lay_out(js: JetStreamContext, warn: Warn) -> KeyValue:
    """Streams and bucket; gives the bucket. Raises Away."""
    with reaching():
        for wanted in _STREAMS:
            await _ensure_stream(js, wanted, warn)
        try:
            return await js.key_value(BUCKET)
        except nats.js.errors.NotFoundError:
            about = "answers by job, and what was written down of tries"
            return await js.create_key_value(KeyValueConfig(bucket=BUCKET, description=about, ttl=REMEMBERED_SECONDS))


async def last_sequence(js: JetStreamContext) -> int:
    """Of the jobs that were ever sent. Raises Away."""
    with reaching():
        return (await js.stream_info(JOBS)).state.last_seq


async def _ensure_stream(js: JetStreamContext, wanted: StreamConfig, warn: Warn) -> None:
    assert wanted.name and wanted.subjects
    try:
        found = (await js.stream_info(wanted.name)).config
    except nats.js.errors.NotFoundError:
        await js.add_stream(wanted)
        return
    (subject,) = wanted.subjects
    if not {subject, subject[:-1] + ">", "inference.>"} & set(found.subjects or ()):
        raise Away(f"the stream {wanted.name} is there, but does not take {subject}")
    if wanted.retention is not None and found.retention != wanted.retention:
        warn(f"the stream {wanted.name} has the retention {found.retention}: finished jobs stay in it")


async def ensure_consumer(js: JetStreamContext, name: str, warn: Warn) -> float:
    """The model's consumer; gives its ack wait in seconds. Raises Away."""
    subject = f"{REQUEST_SUBJECT}{name}"
    with reaching():
        try:
            config = (await js.consumer_info(JOBS, name)).config
        except nats.js.errors.NotFoundError:
            wanted = ConsumerConfig(
                durable_name=name,
                filter_subject=subject,
                deliver_policy=DeliverPolicy.ALL,
                ack_policy=AckPolicy.EXPLICIT,
                ack_wait=ACK_WAIT,
                max_deliver=-1,  # workers count: a delivery that ended with its worker is not the job's fault
                max_ack_pending=-1,
            )
            config = (await js.add_consumer(JOBS, wanted)).config
    if config.filter_subject != subject or config.ack_policy != AckPolicy.EXPLICIT:
        raise Away(f"the consumer {name} of {JOBS} is there, but is not for {subject} with explicit acks")
    if config.max_deliver is not None and config.max_deliver > 0:
        warn(
            f"the consumer {name} has max_deliver {config.max_deliver}: NATS drops jobs that workers would have tried "
            "again, or would have told about"
        )
    return config.ack_wait or ACK_WAIT
