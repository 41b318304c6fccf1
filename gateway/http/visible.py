"""What a key may see: its models, and no others."""

from __future__ import annotations

import contextlib

from aiohttp import web

from gateway.errors import ModelNotFound
from gateway.http.context import KEY, RUNTIME
from gateway.models.registry import ModelSpec
from gateway.state import ModelStatus


def visible_specs(request: web.Request) -> list[ModelSpec]:
    key = request[KEY]
    return [spec for spec in request.app[RUNTIME].manager.registry.specs.values() if key.may_use(spec.id)]


def visible_models(request: web.Request) -> dict[str, ModelStatus]:
    key = request[KEY]
    return {name: status for name, status in request.app[RUNTIME].board.models.items() if key.may_use(name)}


def named_model(request: web.Request, name: str) -> ModelSpec:
    """The model with this id or alias. Raises ModelNotFound: one that this key may not use does not exist for it."""
    registry, key = request.app[RUNTIME].manager.registry, request[KEY]
    with contextlib.suppress(ModelNotFound):
        spec = registry.named(name)
        if key.may_use(spec.id):
            return spec
    known = ", ".join(sorted(filter(key.may_use, registry.specs))) or "none for this key"
    raise ModelNotFound(f"the model {name[:200]!r} does not exist; there are: {known}", param="model")
