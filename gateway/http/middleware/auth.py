"""Fifth: who is it, and may they use this route? Public routes have no scope and pass."""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from aiohttp import web
from aiohttp.typedefs import Handler

from gateway.errors import InsufficientScope, RateLimitExceeded, Unauthorized
from gateway.http.context import CALLER, KEY, RUNTIME, template
from gateway.stores.keys.file import SCOPES, Key
from gateway.stores.keys.ring import presented

ANONYMOUS = Key(id="anonymous", scopes=frozenset(SCOPES))
# "METHOD template" → scope, and template → that of its first row, for methods that it does not know; None: public
SCOPE_OF = web.AppKey("scope_of", dict[str, str | None])


@web.middleware
async def auth(request: web.Request, handler: Handler) -> web.StreamResponse:
    scope = needed_scope(request)
    if scope is None or (scope == "metrics" and not request.app[RUNTIME].settings.metrics_auth_enabled):
        return await handler(request)
    if not recognised(request, scope):
        await authenticated(request, scope)
    return await handler(request)


def recognised(request: web.Request, scope: str) -> bool:
    """Whether it comes with a key that was used before; False where that has still to be found out.

    Raises InsufficientScope.
    """
    runtime = request.app[RUNTIME]
    if not runtime.settings.auth_enabled:
        request[KEY] = ANONYMOUS
        request[CALLER] = client_address(request, runtime.settings.trusted_proxies)
        return True
    headers = request.headers
    secret = presented(headers.get("Authorization"), headers.get("x-api-key"))
    key = runtime.keys.lookup(secret) if secret else None
    if key is not None:
        admit(request, key, scope)
    return key is not None


async def authenticated(request: web.Request, scope: str) -> None:
    """Raises Unauthorized, RateLimitExceeded, InsufficientScope."""
    runtime = request.app[RUNTIME]
    secret = presented(request.headers.get("Authorization"), request.headers.get("x-api-key"))
    try:
        address = client_address(request, runtime.settings.trusted_proxies)
        key = await runtime.keys.authenticate(secret, address)
    except Unauthorized:
        runtime.metrics.auth_failures.inc()
        raise
    except RateLimitExceeded:
        runtime.metrics.rate_limited.labels("auth_failures").inc()
        raise
    admit(request, key, scope)


def admit(request: web.Request, key: Key, scope: str) -> None:
    request[KEY] = key
    request[CALLER] = key.id
    if not key.has(scope):
        raise InsufficientScope(f"the key {key.id} lacks the scope {scope}, which this route needs")


def needed_scope(request: web.Request) -> str | None:
    """A path that does not exist asks for a key too: strangers learn nothing from it. A public one is public by
    whatever method: it is refused for the method, not for want of a key."""
    path, scopes = template(request), request.app[SCOPE_OF]
    if path is None:
        scope = scopes.get(request.path, "infer")
        return scope if scope in (None, "metrics") else "infer"
    return scopes.get(f"{request.method} {path}", scopes.get(path, "infer"))


def client_address(request: web.Request, trusted: tuple[str, ...]) -> str:
    """The peer's address, or the last one in X-Forwarded-For that is not a trusted proxy's own."""
    peer = request.remote or "unknown"
    if not trusted or not _is_trusted(peer, trusted):
        return peer
    hops = ",".join(request.headers.getall("X-Forwarded-For", []))  # some proxies add a line of their own
    for hop in reversed(hops.split(",")):
        address = hop.strip()
        if address and not _is_trusted(address, trusted):
            return address
    return peer


@lru_cache(maxsize=4096)
def _is_trusted(address: str, trusted: tuple[str, ...]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in ipaddress.ip_network(network, strict=False) for network in trusted)
