"""The API's description and the API: the same routes, scopes and errors, in both directions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from schemathesis.openapi import from_dict

from gateway.app import TABLE
from gateway.http.context import EXPOSED
from gateway.http.openapi.document import document
from gateway.state import ModelState, ServiceState
from tests.test_docs import raised

DOCUMENT = document()
PATHS: dict[str, dict[str, dict[str, Any]]] = DOCUMENT["paths"]


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in PATHS.items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def follow(node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in node:
        return node
    found: Any = DOCUMENT
    for name in node["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    assert isinstance(found, dict)
    return found


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for below in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from nodes(below)


def test_the_routes_are_those_of_the_table() -> None:
    served = {(method, path) for method, path, _, _ in TABLE}
    served |= {("HEAD", path) for method, path in served if method == "GET"}
    assert {(method, path) for method, path, _ in operations()} == served


@pytest.mark.parametrize(("method", "path", "scope"), [(row[0], row[1], row[3]) for row in TABLE])
def test_the_scope_of_a_route(method: str, path: str, scope: str | None) -> None:
    security = PATHS[path][method.lower()]["security"]
    schemes = [{scheme: [scope]} for scheme in ("bearer", "x-api-key")] if scope else []
    assert security == ([{}] if scope == "metrics" else []) + schemes


def codes(operation: dict[str, Any]) -> set[tuple[int, str]]:
    return {
        (int(status), code)
        for status, answer in operation["responses"].items()
        for code in follow(answer).get("x-codes", ())
    }


def test_every_error_has_a_route_and_every_route_its_errors() -> None:
    """405 belongs to no operation: it is what a method gets that has none."""
    told = set().union(*(codes(operation) for _, _, operation in operations()))
    assert told == raised() - {(405, "method_not_allowed")}
    for method, path, operation in operations():
        if method == "HEAD":
            get = PATHS[path]["get"]["responses"]
            assert operation["responses"].keys() == get.keys()
            assert not any("content" in answer for answer in operation["responses"].values())
            continue
        statuses = {status for status, _ in codes(operation)}
        assert {400, 408, 413, 414, 431, 500} <= statuses, path
        assert ({401, 403, 429} <= statuses) is bool(operation["security"]), path


def test_every_reference_leads_somewhere_and_nothing_is_left_over() -> None:
    used = {node["$ref"] for node in nodes(DOCUMENT) if isinstance(node.get("$ref"), str)}
    for reference in used:
        assert follow({"$ref": reference})
    there = {f"#/components/{kind}/{name}" for kind, members in DOCUMENT["components"].items() for name in members}
    assert {one for one in there if "/securitySchemes/" not in one} - used == set()


def test_operation_ids_are_names_and_unique() -> None:
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][A-Za-z0-9_]*", name) for name in names)


def test_parameters_in_a_path_are_described() -> None:
    for method, path, operation in operations():
        about = [follow(one) for one in operation["parameters"]]
        assert {one["name"] for one in about if one["in"] == "path"} == set(re.findall(r"{(\w+)}", path)), (
            method,
            path,
        )


def test_states_are_those_of_the_code() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert schemas["ModelState"]["enum"] == list(ModelState)
    assert schemas["ServiceState"]["enum"] == list(ServiceState)


def test_headers_that_browsers_may_read_are_described() -> None:
    described = {name.lower() for name in DOCUMENT["components"]["headers"]}
    assert {name.strip() for name in EXPOSED.split(",")} <= described


def test_schemas_are_schemas_and_examples_fit() -> None:
    from_dict(DOCUMENT).validate()
    schemas = DOCUMENT["components"]["schemas"]
    for name, schema in schemas.items():
        if "example" in schema:
            assert jsonschema_rs.is_valid(inlined(schema), schema["example"]), name
    for method, path, operation in operations():
        for content in operation.get("requestBody", {}).get("content", {}).values():
            for example in content.get("examples", {}).values():
                assert jsonschema_rs.is_valid(inlined(content["schema"]), example["value"]), (method, path)


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that stands alone, with what it refers to."""
    return schema | {"components": {"schemas": DOCUMENT["components"]["schemas"]}}


def test_the_document_is_small_and_holds_no_yaml_surprise() -> None:
    text = json.dumps(DOCUMENT)
    assert len(text) < 600_000
    assert all(isinstance(key, str) for node in nodes(DOCUMENT) for key in node), "a key such as on, off or 200"
