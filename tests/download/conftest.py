"""A server to fetch from, and patience that takes no time."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.models.fetching.download import Patience
from tests.download.origin import Origin, Sleeps


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    origin = Origin()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", origin.handle)
    async with TestServer(app) as server:
        origin.server = server
        yield origin
        origin.release.set()


@pytest.fixture
def sleeps() -> Sleeps:
    return Sleeps()


@pytest.fixture
def patience(sleeps: Sleeps) -> Patience:
    return Patience(margin_bytes=0, sleep=sleeps)
