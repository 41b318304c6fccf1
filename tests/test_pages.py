"""The dashboard's files: who gets them, how they are kept by browsers, and what they may not do."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from gateway.http.pages import FOLDER, parts
from tests.house import ROOT, Gateway

pytestmark = pytest.mark.real

NAMES = sorted(path.name for path in FOLDER.iterdir())
MOST_BYTES = 150_000


def addresses(text: str) -> set[str]:
    return set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", text)) - {"http://www.w3.org/2000/svg"}


def test_the_page_needs_no_key(gateway: Gateway) -> None:
    reply = gateway.get("/", key=None)
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert b'data-keys="asked"' in reply.body
    assert gateway.request("POST", "/", b"").status == 405


@pytest.mark.parametrize("name", NAMES)
def test_a_part(gateway: Gateway, name: str) -> None:
    reply = gateway.get(f"/dashboard/{name}", key=None)
    assert (reply.status, reply.body) == (200, (FOLDER / name).read_bytes())
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert reply.headers["content-type"] == f"{kinds[Path(name).suffix]}; charset=utf-8"


@pytest.mark.parametrize("path", ["/", "/dashboard/app.js"])
def test_what_browsers_are_told(gateway: Gateway, path: str) -> None:
    headers = gateway.get(path, key=None).headers
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("coding", ["", "gzip"])
def test_what_has_not_changed_is_not_sent_again(gateway: Gateway, coding: str) -> None:
    accepts = {"Accept-Encoding": coding} if coding else {}
    first = gateway.get("/dashboard/app.js", key=None, headers=accepts)
    body = gzip.decompress(first.body) if coding else first.body
    assert first.headers.get("content-encoding", "") == coding
    assert first.headers["vary"] == "Accept-Encoding"
    assert body == (FOLDER / "app.js").read_bytes()
    tag = first.headers["etag"]
    again = gateway.get("/dashboard/app.js", key=None, headers=accepts | {"If-None-Match": tag})
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    other = gateway.get("/dashboard/app.js", key=None, headers=accepts | {"If-None-Match": '"other"'})
    assert other.status == 200


@pytest.mark.parametrize("path", ["/", "/dashboard/app.js"])
def test_head(gateway: Gateway, path: str) -> None:
    full, head = gateway.get(path, key=None), gateway.request("HEAD", path, key=None)
    assert (head.status, head.body) == (200, b"")
    same = ("content-length", "content-type", "etag", "content-security-policy")
    assert [head.headers[name] for name in same] == [full.headers[name] for name in same]


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fpages.py", "%2e%2e/pages.py", "index.html, open.js", ".."])
def test_nothing_else_is_served(gateway: Gateway, name: str) -> None:
    reply = gateway.get(f"/dashboard/{name.replace(' ', '%20')}", key=None)
    assert reply.status in (401, 404)
    assert reply.json()["error"]["code"] in ("not_found", "missing_api_key")


def test_all_of_it_is_small_and_names_no_outside_address() -> None:
    assert sum((FOLDER / name).stat().st_size for name in NAMES) < MOST_BYTES
    for name in NAMES:
        assert addresses((FOLDER / name).read_text()) == set(), name
    assert addresses('<img src="//cdn.example/x.js">') == {"//cdn.example/x.js"}


def test_no_markup_is_made_of_data() -> None:
    """Nor inline scripts and styles, which the policy forbids anyway."""
    for name in NAMES:
        text = (FOLDER / name).read_text()
        if name.endswith(".js"):
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text
            ), name
        if name.endswith(".html"):
            assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text), name


def test_the_page_loads_what_there_is() -> None:
    index = (FOLDER / "index.html").read_text()
    named = set(re.findall(r'(?:src|href)="dashboard/([^"]+)"', index))
    for name in NAMES:
        named |= set(re.findall(r'from "\./([^"]+)"', (FOLDER / name).read_text()))
    assert named == set(NAMES) - {"index.html"}


def test_where_no_keys_are_asked_for_the_page_says_so() -> None:
    found = parts()
    asked, opened = found["index.html"].plain, found["index.html, open"].plain
    assert asked.replace(b'data-keys="asked"', b'data-keys="none"') == opened != asked
    assert json.dumps(sorted(set(found) - {"index.html, open"})) == json.dumps(NAMES)


def test_the_parts_are_in_the_package() -> None:
    """setuptools takes what this pattern names, and nothing else."""
    assert '"http/dashboard/*"' in (ROOT / "pyproject.toml").read_text()
    assert all((FOLDER / name).is_file() for name in NAMES)
