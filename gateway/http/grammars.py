"""`/grammars`: what requests may name in their `grammar`; read by everybody, written by administrators."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from gateway.errors import BadRequest, UnsupportedMediaType
from gateway.http.context import KEY, RUNTIME
from gateway.http.inference import read_body
from gateway.pipeline.call import parse_json_object, typed_field
from gateway.stores.grammars.files import Grammar, Version
from gateway.stores.grammars.store import Grammars


async def list_grammars(request: web.Request) -> web.Response:
    """`problems`, for administrators: what lies in the folder and is not used."""
    grammars = request.app[RUNTIME].grammars
    body: dict[str, Any] = {"grammars": [about(grammars, *grammars.current(name)) for name in grammars.names()]}
    if request[KEY].has("admin"):
        body["problems"] = grammars.problems
    return web.json_response(body)


async def get_grammar(request: web.Request) -> web.Response:
    grammars = request.app[RUNTIME].grammars
    return web.json_response(whole(grammars, *grammars.current(request.match_info["name"])))


async def create(request: web.Request) -> web.Response:
    """A name that is taken gets one more version."""
    name, content, description = await _body(request)
    if name is None:
        raise BadRequest("name is missing", param="name")
    grammar, version = await request.app[RUNTIME].grammars.write(name, content, description, new=True)
    return _written(request, grammar, version, 201)


async def replace(request: web.Request) -> web.Response:
    """One more version of what is there."""
    asked = request.match_info["name"]
    name, content, description = await _body(request)
    if name is not None and name != asked:
        raise BadRequest(f"name is {name[:80]!r}, but the path says {asked[:80]!r}", param="name")
    grammar, version = await request.app[RUNTIME].grammars.write(asked, content, description, new=False)
    return _written(request, grammar, version, 200)


async def delete(request: web.Request) -> web.Response:
    """With all its versions; `name@3`: that one alone."""
    runtime, name = request.app[RUNTIME], request.match_info["name"]
    await runtime.grammars.delete(name)
    runtime.events.emit("grammar.deleted", f"{name} by the key {request[KEY].id}", grammar=name, key=request[KEY].id)
    return web.Response(status=204)


def about(grammars: Grammars, grammar: Grammar, version: Version) -> dict[str, Any]:
    """`version` is what the name alone stands for, or the one that was asked for."""
    usable = grammars.usable(grammar)
    return {
        "name": grammar.name,
        "description": grammar.about.description,
        "version": version.number,
        "created": _told(grammar.about.created or min(each.created for each in usable)),
        "updated": _told(max(each.created for each in usable)),
        "uses": grammars.uses(grammar.name),
        "versions": [
            {
                "version": each.number,
                "created": _told(each.created),
                "bytes": len(each.text.encode()),
                "uses": grammars.uses(grammar.name, each.number),
            }
            for each in usable
        ],
    }


def whole(grammars: Grammars, grammar: Grammar, version: Version) -> dict[str, Any]:
    return about(grammars, grammar, version) | {"content": version.text}


def _told(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")


def _written(request: web.Request, grammar: Grammar, version: Version, status: int) -> web.Response:
    runtime, key_id = request.app[RUNTIME], request[KEY].id
    written = f"{grammar.name}@{version.number}"
    runtime.events.emit("grammar.written", f"{written} by the key {key_id}", grammar=written, key=key_id)
    headers = {"Location": f"/grammars/{grammar.name}"} if status == 201 else {}
    return web.json_response(whole(runtime.grammars, grammar, version), status=status, headers=headers)


async def _body(request: web.Request) -> tuple[str | None, str, str | None]:
    """Name, content and description. Raises BadRequest, UnsupportedMediaType, and what `read_body` raises."""
    runtime, kind = request.app[RUNTIME], request.content_type
    if "Content-Type" in request.headers and kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType(f"Content-Type is {kind[:100]}: send application/json")
    fields = parse_json_object(await read_body(request, runtime.settings, runtime.budget))
    name, content, description = (
        typed_field(fields, each, str, "a string") for each in ("name", "content", "description")
    )
    if not content:
        raise BadRequest('content is missing: send {"name", "content": "root ::= …"}', param="content")
    return name, content, description
