"""`/docs`: the page, what it is made of, and what stands in it in a real browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from gateway.http.openapi.document import document
from tests.browser.kit import Scheme, chromium, visit
from tests.house import Gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(40), pytest.mark.xdist_group("reference")]

PAGES = ["/docs", "/swagger/index.html"]
PARTS = ["/docs/docs.css", "/docs/docs.js"]
DOCUMENT = document()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize("path", [*PAGES, *PARTS, "/openapi.json", "/swagger/doc.json"])
def test_it_is_served_without_a_key_and_cached(gateway: Gateway, path: str) -> None:
    reply = gateway.get(path, key=None)
    assert reply.status == 200
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "unsafe" not in reply.headers["content-security-policy"]
    tag = {"If-None-Match": reply.headers["etag"]}
    assert gateway.get(path, key=None, headers=tag).status == 304
    head = gateway.request("HEAD", path, key=None)
    assert (head.status, head.body, head.headers["etag"]) == (200, b"", reply.headers["etag"])


def test_it_is_small_and_names_no_other_place(gateway: Gateway) -> None:
    found = [gateway.get(path, key=None).body for path in [PAGES[0], *PARTS]]
    assert sum(map(len, found)) < 100_000
    assert not any(b"http://" in body or b"https://" in body for body in found)
    assert gateway.get("/docs/document.py", key=None).json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", PAGES)
def test_every_operation_stands_there(gateway: Gateway, browser: Browser, path: str) -> None:
    wanted = {
        operation["operationId"]
        for item in DOCUMENT["paths"].values()
        for method, operation in item.items()
        if method != "head" and "x-alias-of" not in operation
    }
    with visit(browser, gateway) as visitor:
        page = visitor.page
        page.goto(gateway.url + path)
        expect(page.locator("section h2").first).to_be_visible()
        assert set(page.locator("details.operation").evaluate_all("all => all.map(one => one.id)")) == wanted
        page.locator("details.operation").evaluate_all("all => all.forEach(one => { one.open = true; })")
        expect(page.locator(".inside")).to_have_count(len(wanted))
        page.locator(".inside details").evaluate_all("all => all.forEach(one => { one.open = true; })")
        expect(page.locator("body")).not_to_contain_text("[object Object]")
        expect(page.locator("body")).not_to_contain_text("undefined")


def test_search_and_link(gateway: Gateway, browser: Browser) -> None:
    with visit(browser, gateway) as visitor:
        page = visitor.page
        page.goto(f"{gateway.url}/docs#post_v1_chat_completions")
        chat = page.locator("#post_v1_chat_completions")
        expect(chat.locator("pre").first).to_contain_text(f"curl {gateway.url}/v1/chat/completions")
        expect(chat).to_contain_text("Also /chat/completions")
        page.keyboard.press("/")
        page.keyboard.type("insufficient_memory force")
        expect(page.locator("details.operation:visible")).to_have_count(0)
        expect(page.locator("#none")).to_be_visible()
        page.get_by_label("Search").fill("evict")
        expect(page.locator("#post_v1_plan")).to_be_visible()
        expect(chat).to_be_hidden()
        expect(page.get_by_role("status")).to_contain_text("routes")


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light"), (1920, "dark")])
def test_anybody_can_use_it(gateway: Gateway, browser: Browser, width: int, scheme: Scheme) -> None:
    with visit(browser, gateway, width, scheme) as visitor:
        page = visitor.page
        page.goto(f"{gateway.url}/docs#post_v1_completions")
        page.locator("#post_v1_completions .answer details").first.evaluate("one => { one.open = true; }")
        expect(page.locator("#post_v1_completions .fields").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = Axe().run(page).response["violations"]
        assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
        if folder := os.environ.get("PICTURES_OF_THE_REFERENCE"):
            page.screenshot(path=Path(folder) / f"reference-{width}-{scheme}.png")
            page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=Path(folder) / f"reference-top-{width}-{scheme}.png")
