"""Fourth: what is refused by its size before a byte of the body is read."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from gateway.errors import PayloadTooLarge
from gateway.http.context import RUNTIME


@web.middleware
async def limits(request: web.Request, handler: Handler) -> web.StreamResponse:
    check_length(request)
    return await handler(request)


def check_length(request: web.Request) -> None:
    """Raises PayloadTooLarge."""
    length = request.content_length
    bound = request.app[RUNTIME].settings.max_request_body_size
    if length is not None and length > bound:
        raise PayloadTooLarge(f"the body has {length} bytes; MAX_REQUEST_BODY_SIZE allows {bound}")
