"""The dashboard of a busy gateway, at three widths and in both themes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.kit import Scheme, Yard, off, settled, violations, visit
from tests.house import ADMIN, ROOT, USER, Gateway, eventually
from tests.real.herd import rows

pytestmark = [pytest.mark.real, pytest.mark.timeout(60), pytest.mark.xdist_group("browser")]

PICTURES = ROOT / "docs" / "pictures"
PICTURED = {(1280, "light"): 1000, (1280, "dark"): 1000, (390, "light"): 844}  # heights
MOST_PICTURE_BYTES = 150_000


@pytest.fixture(scope="module")
def busy(herd_yard: Yard) -> Iterator[Yard]:
    """One model has failed, one is loading, one is busy and has somebody waiting; some requests went wrong."""
    gateway = herd_yard.gateway
    off(gateway, "gated", "slow")
    herd_yard.close_gate()
    gateway.chat(model="broken")
    gateway.chat(model="nowhere")
    for number in range(10):
        model, key = ("alder", "birch")[number % 3 == 2], (USER, ADMIN)[number % 4 == 3]
        gateway.chat("the sea " * 20 * (number % 4 + 1), model=model, key=key, max_tokens=40 * (number % 5) + 20)
    together = [asked(gateway, 60) for _ in range(3)]
    for one in together:
        one.getresponse().read()
        one.close()
    lasting = [asked(gateway, 4000) for _ in range(2)]
    gateway.request("POST", "/v1/models/load", {"model": "gated"}, key=ADMIN)
    eventually(lambda: (row := rows(gateway)["slow"])["inflight"] == 1 and row["queue_len"] == 1)
    yield herd_yard
    for one in lasting:
        one.close()
    herd_yard.open_gate()


def asked(gateway: Gateway, tokens: int) -> HTTPConnection:
    """With a request on its way to the model that has one place."""
    body = {"model": "slow", "messages": [{"role": "user", "content": "go on"}], "max_tokens": tokens, "stream": True}
    connection = HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    headers = {"Authorization": f"Bearer {USER}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return connection


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_the_page_is_fit_to_be_used(
    browser: Browser, busy: Yard, width: int, scheme: Scheme, request: pytest.FixtureRequest
) -> None:
    """Nothing sticks out, and axe-core finds nothing serious, signed in or not."""
    with visit(browser, busy.gateway, width, scheme) as visitor:
        page = visitor.page
        page.goto(visitor.gateway.url)
        expect(page.get_by_label("Key", exact=True)).to_be_focused()
        if width == 390:
            assert violations(page) == []
        visitor.sign_in()
        settled(page)
        expect(page.locator(".waterfall li").first).to_be_visible()
        expect(visitor.model("slow")).to_contain_text("1 waiting")
        expect(visitor.model("gated")).to_contain_text("Loading")
        expect(page.get_by_role("status").filter(has_text="broken has failed.")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert violations(page) == []
        if folder := request.config.getoption("--look"):
            page.screenshot(path=f"{folder}/{width}-{scheme}.png", full_page=True)
        if request.config.getoption("--pictures") and (height := PICTURED.get((width, scheme))):
            page.wait_for_timeout(25_000)  # the lines begin
            page.set_viewport_size({"width": width, "height": height})
            page.screenshot(path=PICTURES / f"dashboard-{width}-{scheme}.png")


def test_the_pictures_are_those_that_the_docs_show() -> None:
    shown = (ROOT / "docs" / "DASHBOARD.md").read_text()
    names = {f"dashboard-{width}-{scheme}.png" for width, scheme in PICTURED}
    assert {path.name for path in PICTURES.iterdir()} == names
    assert all(f"pictures/{name}" in shown for name in names)
    assert all((PICTURES / name).stat().st_size <= MOST_PICTURE_BYTES for name in names)


def test_nothing_jumps_while_the_page_fills(browser: Browser, busy: Yard) -> None:
    """Cumulative layout shift, as browsers reckon it, once signed in: below 0.1 counts as good."""
    with visit(browser, busy.gateway) as visitor:
        page = visitor.page
        visitor.sign_in()
        page.evaluate(
            "window.shift = 0; new PerformanceObserver(list => "
            "list.getEntries().forEach(one => { shift += one.value; })).observe({type: 'layout-shift'})"
        )
        settled(page)
        expect(page.locator(".waterfall li").first).to_be_visible()
        page.wait_for_timeout(2500)  # two snapshots, and what they change
        assert page.evaluate("shift") < 0.1
