"""What the holder of an admin key may ask for about the log: `X-Log-Level`, `?log=`, `X-Log-Infer: 1`.

Of other keys these are ignored: a client of theirs that sends them everywhere gets its answers all the same.
"""

from __future__ import annotations

from aiohttp import web

from gateway.errors import BadRequest
from gateway.http.hot import HotRequest
from gateway.pipeline.call import Call
from gateway.pipeline.loglines import LEVELS

_YES = ("1", "true", "yes", "on")


def log_as_asked(request: web.Request, call: Call) -> None:
    """Raises BadRequest for a level that does not exist; the header counts before the query."""
    asked = request.headers.get("X-Log-Level")
    if asked is None and not isinstance(request, HotRequest):  # whose path has no query
        asked = request.query.get("log")
    if asked:
        level = asked.lower()
        if level not in LEVELS:
            raise BadRequest(f"the log level is {asked[:40]!r}: must be one of {', '.join(LEVELS)}", param="log")
        call.log = level
    call.log_infer = request.headers.get("X-Log-Infer", "").lower() in _YES
