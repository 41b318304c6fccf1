"""Jobs that do not come to the spine, written down and counted as HTTP's refused requests are."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from gateway.errors import CorralError
from gateway.pipeline.account import Record
from gateway.pipeline.identity import identity
from gateway.runtime import Runtime

log = logging.getLogger("corral.workers")

NO_ROUTE = "unknown"  # in metrics, as over HTTP


@dataclass(frozen=True, slots=True)
class Refused:
    """What is known of such a job. `route` is one of ROUTES, or empty where it cannot be told."""

    transport: str
    job_id: str | None  # as a request's id where it is sane
    key_id: str
    route: str
    model: str = ""
    traceparent: str | None = None


def note(runtime: Runtime, job: Refused, error: CorralError) -> None:
    request_id, traceparent = identity(job.job_id, job.traceparent)
    record = Record(
        ts=time.time(),
        request_id=request_id,
        trace_id=traceparent[3:35],
        key_id=job.key_id,
        route=job.route,
        method="POST",
        transport=job.transport,
        stream=False,
        model=job.model,
        status=error.status,
        error=error.code,
    )
    runtime.metrics.count_request(job.route or NO_ROUTE, record.method, record.status, record.model)
    runtime.accounts.refused(record)
    log.info("the job is refused: %s", error.code, extra={"request_id": request_id})  # its message may quote the job
