"""OpenAPI 3.1 of all routes, put together from the files in parts/.

A part has one subject: its `tag`, its `operations` and the `schemas` that they use; or schemas alone. In it
- `at` lists method and path of one operation and its other names; `GET` brings `HEAD` with it.
- `scope` is what the key must have; without it no key is needed.
- `dialect` names another shape of its errors, of `_DIALECTS`.
- `model: generation` or `model: texts` is said of what goes to a model.
- `body` is the request's; `answers` are those that are no errors: `schema` of JSON, or `type` of something else, or
  `types`, and `events` of a stream (`unnamed`: sent without `event:`).
- `errors` are codes, or names of lists in general.yaml; what all routes may answer is added.
- `$ref` names a schema of any part.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from gateway import __version__
from gateway.errors import CorralError

Node = dict[str, Any]

_RATE_LIMITS = [f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")]
_DIALECTS = {"messages": "MessagesError", "infer": "InferError"}
_NO_PARTS = ("general.yaml", "errors.yaml")


@cache
def encoded() -> bytes:
    """The document as JSON; made once, in some 100 ms."""
    return json.dumps(document(), ensure_ascii=False, separators=(",", ":")).encode()


def document() -> Node:
    parts = _parts()
    general = parts["general.yaml"]
    errors = Errors(general, parts["errors.yaml"])
    about = [part for name, part in sorted(parts.items(), key=_place) if name not in _NO_PARTS]
    paths: Node = {}
    for part in about:
        for operation in part.get("operations", ()):
            for method, path, described in _expanded(operation, part["tag"]["name"], general, errors):
                paths.setdefault(path, {})[method] = described
    schemas = {name: schema for part in (general, *about) for name, schema in part.get("schemas", {}).items()}
    tree: Node = {
        "openapi": "3.1.0",
        "info": {"title": "Corral", "version": __version__, **general["info"]},
        "servers": [{"url": "/"}],
        "tags": [part["tag"] for part in about if "tag" in part],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": errors.responses,
            "parameters": general["parameters"],
            "headers": general["headers"],
            "securitySchemes": general["security"],
        },
    }
    _link(tree, frozenset(schemas))
    return tree


def _parts() -> dict[str, Node]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    folder = files(__package__) / "parts"
    return {one.name: yaml.load(one.read_text(encoding="utf-8"), loader) for one in folder.iterdir()}


def _place(named: tuple[str, Node]) -> int:
    order = ("chat", "texts", "models", "grammars", "status", "live", "records", "cache", "admin", "probes")
    stem = named[0].partition(".")[0]
    return order.index(stem) if stem in order else len(order)


# --- operations


def _expanded(operation: Node, tag: str, general: Node, errors: Errors) -> Iterator[tuple[str, str, Node]]:
    """(method, path, operation object) of each of its names; for GET that of HEAD too."""
    first = operation["at"][0]
    for name in operation["at"]:
        method, path = name.split(" ")
        described = _described(operation, tag, general, errors)
        described["operationId"] = _identifier(method, path)
        if name != first:
            described["description"] = f"Another name of `{first}`."
            described["x-alias-of"] = first
        yield method.lower(), path, described
        if method == "GET":
            yield "head", path, _head(described, path, errors)


def _identifier(method: str, path: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in path).split()
    return "_".join([method.lower(), *words])


def _described(operation: Node, tag: str, general: Node, errors: Errors) -> Node:
    scope, body = operation.get("scope"), operation.get("body")
    described: Node = {"tags": [tag], "summary": operation["summary"]}
    if "description" in operation:
        described["description"] = operation["description"].strip()
    # `/metrics` asks for a key only where it is told to
    described["security"] = [{}] if scope == "metrics" else []
    described["security"] += [{scheme: [scope]} for scheme in general["security"]] if scope else []
    names = [*operation.get("parameters", ()), "request_id", "traceparent"]
    described["parameters"] = [
        {"$ref": f"#/components/parameters/{one}"} if isinstance(one, str) else copy.deepcopy(one) for one in names
    ]
    if body:
        content: Node = {"schema": copy.deepcopy(body["schema"])}
        if "example" in body:
            content["examples"] = {"usual": {"value": body["example"]}}
        described["requestBody"] = {"required": True, "content": {body.get("type", "application/json"): content}}
    described["responses"] = responses = {
        str(status): _answer(answer, operation) for status, answer in operation["answers"].items()
    }
    for status, answer in errors.responses_of(operation).items():
        if status not in responses:
            responses[status] = answer
    return described


def _answer(answer: Node, operation: Node) -> Node:
    described: Node = {"description": answer["about"], "headers": _headers("x-request-id", *answer.get("headers", ()))}
    if operation.get("dialect") == "messages":
        described["headers"] |= _headers("request-id")
    if "model" in operation:
        described["headers"] |= _headers("x-queue-time-ms", "openai-processing-ms", "x-cache", *_RATE_LIMITS)
    content = {kind: copy.deepcopy(one) for kind, one in answer.get("types", {}).items()}
    if "type" in answer:
        content[answer["type"]] = {"schema": copy.deepcopy(answer.get("schema", {"type": "string"}))}
    elif "schema" in answer:
        content["application/json"] = {"schema": copy.deepcopy(answer["schema"])}
    if "events" in answer:
        content["text/event-stream"] = {"schema": _event(answer["events"])}
    if content:
        described["content"] = content
    return described


def _event(events: Node) -> Node:
    """One event of a stream: before version 3.2, the schema of a stream is said to be that of each event."""
    sides = []
    for title, event in events.items():
        data = {"const": event["text"]} if "text" in event else {"contentMediaType": "application/json"}
        if "schema" in event:
            data["contentSchema"] = copy.deepcopy(event["schema"])
        # one that is sent without a name is called message
        properties = {"event": {"const": "message" if event.get("unnamed") else title}, "data": data}
        sides.append({"title": title, "description": event["about"], "properties": properties})
    return {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}, "anyOf": sides}


def _head(described: Node, path: str, errors: Errors) -> Node:
    """The same without bodies."""
    head = copy.deepcopy(described)
    head["operationId"] = _identifier("HEAD", path)
    head["responses"] = {status: errors.bare(answer) for status, answer in described["responses"].items()}
    return head


def _headers(*names: str) -> Node:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


# --- errors


class Errors:
    """Codes as responses. Codes that share a status share a response, of which the document keeps one."""

    def __init__(self, general: Node, when: Mapping[str, str]) -> None:
        self.responses: Node = {}
        self._lists: dict[str, list[str]] = general["errors_of"]
        self._when = when
        self._kinds = {kind.code: kind for kind in _kinds(CorralError)}

    def responses_of(self, operation: Node) -> Node:
        """By status, each a reference into `responses`."""
        by_status: dict[int, list[str]] = {}
        for code in self._codes(operation):
            by_status.setdefault(self._kinds[code].status, []).append(code)
        dialect = operation.get("dialect", "")
        return {str(status): self._shared(status, codes, dialect) for status, codes in sorted(by_status.items())}

    def _codes(self, operation: Node) -> Iterable[str]:
        names = ["all", *operation.get("errors", ())]
        names += ["keyed"] if operation.get("scope") else []
        names += {"generation": ["model", "generation"], "texts": ["model"]}.get(operation.get("model", ""), [])
        codes = {code for name in names for code in self._lists.get(name, [name])}
        return [code for code in self._when if code in codes]

    def _shared(self, status: int, codes: list[str], dialect: str) -> Node:
        name = "_".join(filter(None, [str(status), dialect, *codes]))
        if name not in self.responses:
            self.responses[name] = self._response(codes, dialect)
        return {"$ref": f"#/components/responses/{name}"}

    def _response(self, codes: list[str], dialect: str) -> Node:
        coded = {"type": "object", "properties": {"error": {"properties": {"code": {"enum": codes}}}}}
        schema: Node = {"allOf": [{"$ref": "Error"}, coded]}
        if dialect:  # what cannot be read has no route yet, so its refusal has the usual shape
            schema = {"anyOf": [{"$ref": _DIALECTS[dialect]}, schema]}
        return {
            "description": "\n".join(f"- `{code}`: {self._when[code]}" for code in codes),
            "headers": _headers("x-request-id", *(["request-id"] if dialect == "messages" else []), *self._more(codes)),
            "content": {"application/json": {"schema": schema}},
            "x-codes": codes,
        }

    def _more(self, codes: list[str]) -> list[str]:
        status = self._kinds[codes[0]].status
        limited = ["Retry-After", "retry-after-ms", "x-should-retry", *_RATE_LIMITS]
        return {401: ["WWW-Authenticate"], 429: limited, 501: ["x-should-retry"], 503: ["Retry-After"]}.get(status, [])

    def bare(self, answer: Node) -> Node:
        """Of a HEAD: the same without its body."""
        known = self.responses.get(answer.get("$ref", "").rpartition("/")[2], answer)
        return {name: copy.deepcopy(known[name]) for name in ("description", "headers") if name in known}


def _kinds(kind: type[CorralError]) -> Iterator[type[CorralError]]:
    """Those below first: of two that share a code, the more general one counts."""
    for below in kind.__subclasses__():
        yield from _kinds(below)
    yield kind


def _link(node: Any, schemas: frozenset[str]) -> None:
    """`$ref: Name` of a schema, in full."""
    if isinstance(node, dict):
        if node.get("$ref") in schemas:
            node["$ref"] = f"#/components/schemas/{node['$ref']}"
        for value in node.values():
            _link(value, schemas)
    elif isinstance(node, list):
        for value in node:
            _link(value, schemas)
