"""The request's path on one screen: middleware in order, then the routes with the scope that each needs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator

from aiohttp import web

from gateway.errors import ConfigError
from gateway.http import admin, cache, grammars, live, logs, models, ops, pages, status, telemetry, usage
from gateway.http.context import RUNTIME, on_prepare
from gateway.http.hot import HotRoutes
from gateway.http.inference import expected, infer
from gateway.http.middleware.auth import SCOPE_OF, auth
from gateway.http.middleware.cors import cors
from gateway.http.middleware.errors import errors
from gateway.http.middleware.limits import limits
from gateway.http.middleware.request_id import request_id
from gateway.http.openapi import serving
from gateway.http.protocol import connection_factory, expire_connections, is_unsent
from gateway.pipeline.routes import ROUTES
from gateway.runtime import Runtime

MIDDLEWARE = (request_id, cors, errors, limits, auth)

# method, path, handler, scope (None: no key)
TABLE = (
    ("GET", "/ping", ops.ping, None),
    ("GET", "/healthz", ops.healthz, None),
    ("GET", "/readyz", ops.readyz, None),
    ("GET", "/health", ops.health, None),
    ("GET", "/metrics", ops.metrics, "metrics"),
    ("GET", "/", pages.page, None),
    ("GET", "/dashboard/{file}", pages.part, None),
    ("GET", "/docs", serving.page, None),
    ("GET", "/swagger/index.html", serving.page, None),
    ("GET", "/docs/{file}", serving.part, None),
    ("GET", "/openapi.json", serving.specification, None),
    ("GET", "/swagger/doc.json", serving.specification, None),
    *(("POST", template, infer, "infer") for template in ROUTES),
    ("GET", "/v1/models", models.list_models, "infer"),
    ("GET", "/v1/models/status", status.all_status, "infer"),
    ("GET", "/v1/models/status/file", status.status_file, "infer"),
    ("GET", "/v1/models/status/stream", status.stream, "infer"),
    ("GET", "/v1/models/status/{model}", status.one_status, "infer"),
    ("GET", "/v1/models/failed", status.failed, "infer"),
    ("GET", "/v1/models/{model}/status", status.one_status, "infer"),
    ("GET", "/v1/models/{model}", models.get_model, "infer"),
    ("GET", "/v1/health/models", status.health_models, "infer"),
    ("GET", "/v1/queue/stats", status.queue_stats, "infer"),
    ("GET", "/models", models.list_files, "infer"),
    ("GET", "/status", status.instances, "infer"),
    ("GET", "/vram", status.vram, "infer"),
    ("GET", "/v1/usage", usage.usage, "infer"),
    ("GET", "/grammars", grammars.list_grammars, "infer"),
    ("GET", "/grammars/{name}", grammars.get_grammar, "infer"),
    ("POST", "/grammars", grammars.create, "admin"),
    ("PUT", "/grammars/{name}", grammars.replace, "admin"),
    ("DELETE", "/grammars/{name}", grammars.delete, "admin"),
    ("POST", "/v1/models/load", models.load, "admin"),
    ("POST", "/v1/models/eject", models.eject, "admin"),
    ("POST", "/v1/models/{model}/reset", models.reset, "admin"),
    ("POST", "/v1/plan", models.plan, "admin"),
    ("GET", "/logs", logs.logs, "admin"),
    ("GET", "/v1/telemetry/summary", telemetry.summary, "admin"),
    ("GET", "/v1/telemetry/requests", telemetry.requests, "admin"),
    ("GET", "/v1/telemetry/errors", telemetry.errors, "admin"),
    ("GET", "/metrics/stream", live.stream, "admin"),
    ("GET", "/v1/cache/stats", cache.stats, "admin"),
    ("POST", "/v1/cache/clear", cache.clear, "admin"),
    ("POST", "/reload", admin.reload, "admin"),
    ("GET", "/upstream/{model}/{what}", admin.upstream, "admin"),
)

BACKLOG = 4096  # aiohttp's 128 drops connections when some hundred clients come at once
_OF_THE_PORT = (errno.EADDRINUSE, errno.EACCES)  # what else keeps us from listening lies with the address


def create_app(runtime: Runtime) -> web.Application:
    app = web.Application(middlewares=MIDDLEWARE)
    app[RUNTIME] = runtime
    app[SCOPE_OF] = {}
    app[live.FEED] = live.LiveFeed(runtime)
    for method, path, handler, scope in TABLE:
        app.router.add_route(method, path, handler, expect_handler=expected)
        if method == "GET":
            app.router.add_route("HEAD", path, handler, expect_handler=expected)
        app[SCOPE_OF][f"{method} {path}"] = scope
        app[SCOPE_OF].setdefault(path, scope)
    app.on_response_prepare.append(on_prepare)
    return app


def hot_routes(app: web.Application) -> HotRoutes:
    """What is asked for all day: the steps of MIDDLEWARE in the same order, without the rest of aiohttp."""
    return HotRoutes({RUNTIME: app[RUNTIME]}, ROUTES, infer)


@contextlib.asynccontextmanager
async def listening(runtime: Runtime) -> AsyncIterator[int]:
    """Serve HTTP for as long as the block runs; gives the port. Raises ConfigError where it cannot be had.

    Requests that run when the block ends are cancelled: what they hold goes back, and their clients are told.
    """
    settings = runtime.settings
    app = create_app(runtime)
    runner = web.AppRunner(app, handler_cancellation=True, handle_signals=False, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    assert runner.server is not None
    host = None if settings.host == "::" else settings.host  # None is both families, as :: is to most programs
    try:
        server = await asyncio.get_running_loop().create_server(
            connection_factory(runner.server, settings, hot_routes(app)), host, settings.port, backlog=BACKLOG
        )
    except OSError as error:
        await runner.cleanup()
        number = error.errno or 0  # of a name that cannot be looked up it is negative
        reason = os.strerror(number) if number > 0 else error.strerror or str(error)
        name, value = ("PORT", settings.port) if number in _OF_THE_PORT else ("HOST", settings.host)
        where = f"{settings.host}:{settings.port}"
        raise ConfigError([f"{settings.told_as(name)}={value}: cannot listen on {where}: {reason}"]) from None
    inner = runner.server
    runtime.ticks.append(lambda now: expire_connections(inner, now, settings))
    runtime.unsent.append(lambda: is_unsent(inner))
    runtime.ticks.append(app[live.FEED].tick)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await runtime.spine.cut()
        await runner.cleanup()
