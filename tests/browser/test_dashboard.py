"""The dashboard in a real Chromium, before a real gateway with real llama-servers."""

from __future__ import annotations

import contextlib
import json
import re
from http.client import HTTPConnection
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.browser.kit import Yard, off, settled, violations, visit
from tests.house import ADMIN, ROOT, USER, Gateway, eventually, free_port, running_gateway
from tests.real.herd import herd, states

pytestmark = [pytest.mark.real, pytest.mark.timeout(40), pytest.mark.xdist_group("browser")]


# --- what an administrator does


def test_a_model_is_loaded_asked_seen_and_ejected(browser: Browser, herd_yard: Yard) -> None:
    gateway = herd_yard.gateway
    off(gateway, "gated")
    herd_yard.close_gate()
    with visit(browser, gateway) as visitor:
        visitor.sign_in()
        page = visitor.page
        settled(page)
        row = visitor.model("gated")
        expect(row).to_contain_text("Off")

        row.get_by_role("button", name="Load gated").click()
        expect(row).to_contain_text("Loading")
        expect(row.get_by_role("progressbar")).to_be_visible()
        herd_yard.open_gate()
        expect(row).to_contain_text("Ready")
        expect(row).to_contain_text("0 of 2")
        expect(page.locator("#memory")).to_contain_text("gated")

        before = set(ids(page))
        page.get_by_label("Model", exact=True).select_option("gated")
        page.get_by_label("at most").fill("24")
        page.get_by_label("Message").fill("What <b>is</b> in the meadow?")
        page.get_by_label("Message").press("Enter")
        expect(page.locator(".turn.mine")).to_have_text("What <b>is</b> in the meadow?")
        expect(page.locator(".turn-note")).to_contain_text("24 tokens")
        assert len(page.locator(".turn.theirs").inner_text().split()) > 5

        asked = page.locator(".waterfall li").filter(has_text="gated").first
        expect(asked).to_contain_text("24 tok")
        asked.locator("summary").click()
        expect(asked).to_contain_text("/v1/chat/completions, streamed")
        (number,) = set(re.findall(r"req_\w+", asked.inner_text())) - before
        logged = gateway.get("/logs?limit=5&model=gated", key=ADMIN).json()["logs"]
        assert number in [one["request_id"] for one in logged]
        page.get_by_role("button", name="7 days").click()
        expect(page.locator("#usage-body")).to_contain_text("admin")

        row.get_by_role("button", name="Eject gated").click()
        expect(row).to_contain_text("Off")
        assert states(gateway)["gated"] == "off"
        expect(page.locator("#said")).to_have_text("gated is unloaded")


def ids(page: Page) -> list[str]:
    return re.findall(r"req_\w+", page.locator("#requests-list").inner_text())


def test_a_failed_model_is_told_and_reset(browser: Browser, herd_yard: Yard) -> None:
    gateway = herd_yard.gateway
    with visit(browser, gateway) as visitor:
        visitor.sign_in()
        settled(visitor.page)
        assert gateway.chat(model="broken").status == 503
        notice = visitor.page.get_by_role("status").filter(has_text="broken has failed.")
        expect(notice).to_be_visible()
        expect(visitor.model("broken")).to_contain_text("Failed")
        visitor.page.locator("#requests-kind").get_by_text("Failed").click()
        expect(visitor.page.locator("#requests-list li").first).to_contain_text("model_failed")

        notice.get_by_role("button", name="Reset").click()
        expect(visitor.model("broken")).to_contain_text("Off")
        expect(notice).not_to_be_visible()


def test_an_answer_is_stopped(browser: Browser, herd_yard: Yard) -> None:
    gateway = herd_yard.gateway
    with visit(browser, gateway) as visitor:
        page = visitor.page
        visitor.sign_in()
        settled(page)
        ask_slow(page)
        expect(visitor.model("slow")).to_contain_text("1 of 1")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".turn-note")).to_contain_text("stopped")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        expect(page.locator(".waterfall li").filter(has_text="slow").first).to_contain_text("499")


def ask_slow(page: Page) -> None:
    """An answer that takes some twenty seconds has begun."""
    page.get_by_label("Model", exact=True).select_option("slow")
    page.get_by_label("at most").fill("4000")
    page.get_by_label("Message").fill("Tell me everything")
    page.get_by_label("Message").press("Enter")
    expect(page.locator(".turn.theirs")).not_to_be_empty()


def test_a_busy_model_is_ejected_only_after_a_question(browser: Browser, herd_yard: Yard) -> None:
    with visit(browser, herd_yard.gateway) as visitor:
        page = visitor.page
        visitor.sign_in()
        settled(page)
        ask_slow(page)
        row = visitor.model("slow")
        expect(row).to_contain_text("1 of 1")
        dialog = page.get_by_role("dialog")
        row.get_by_role("button", name="Eject slow").click()
        expect(dialog).to_contain_text("It serves 1 request at this moment.")
        assert violations(page) == []
        page.keyboard.press("Escape")
        expect(dialog).not_to_be_visible()
        expect(row).to_contain_text("Ready")

        row.get_by_role("button", name="Eject slow").click()
        dialog.get_by_role("button", name="Now").click()
        expect(row).to_contain_text("Off")
        expect(page.locator(".turn-note.bad")).to_be_visible()
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        assert all("ERR_INCOMPLETE_CHUNKED_ENCODING" in line for line in visitor.trouble)
        visitor.trouble.clear()


def test_a_large_herd(browser: Browser, chat_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for number in range(15):
        (folder / f"model-{number}.gguf").symlink_to(chat_model)
    with herd(tmp_path / "gateway", folder) as gateway, visit(browser, gateway) as visitor:
        page = visitor.page
        assert gateway.chat(model="model-14").status == 200
        visitor.sign_in()
        settled(page)
        shown = page.locator("li.model")
        expect(shown).to_have_count(12)
        expect(shown.first).to_contain_text("model-14")
        expect(shown.nth(1)).to_have_text(re.compile(r"^model-0\s*Off\s*Load$"))
        page.get_by_role("button", name="Show 3 more").click()
        expect(shown).to_have_count(15)
        page.get_by_label("Filter the models").fill("-13")
        expect(shown).to_have_count(1)
        visitor.model("model-13").get_by_role("button", name="Load").click()
        expect(visitor.model("model-13")).to_contain_text("Ready")
        page.get_by_label("Filter the models").fill("nothing")
        expect(page.locator("#models-empty")).to_have_text("No model is called like “nothing”.")


# --- keys


def test_a_weaker_key_sees_less_and_is_told_so(browser: Browser, herd_yard: Yard) -> None:
    with visit(browser, herd_yard.gateway) as visitor:
        page = visitor.page
        visitor.sign_in(USER)
        settled(page)
        expect(page.locator("#who")).to_contain_text("infer")
        expect(page.locator("#requests")).not_to_be_visible()
        expect(page.get_by_role("button", name=re.compile("^(Load|Eject|Reset) "))).to_have_count(0)
        expect(page.locator("#weaker")).to_contain_text("keys with the scope admin")
        expect(visitor.model("alder")).to_contain_text("0 of 4")
        page.get_by_label("Message").fill("hello")
        page.get_by_label("at most").fill("8")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".turn-note")).to_contain_text("8 tokens")


def test_a_key_that_is_refused(browser: Browser, herd_yard: Yard) -> None:
    with visit(browser, herd_yard.gateway) as visitor:
        page = visitor.page
        visitor.sign_in("sk-nobody-0123456789abcdefghij")
        expect(page.get_by_role("alert")).to_contain_text("key")
        expect(page.get_by_label("Key", exact=True)).to_be_focused()
        expect(page.locator("#board")).not_to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0
        assert visitor.refused() == [401]


def test_a_key_stays_in_its_tab(browser: Browser, herd_yard: Yard) -> None:
    with visit(browser, herd_yard.gateway) as visitor:
        page = visitor.page
        visitor.sign_in()
        settled(page)
        assert ADMIN not in page.url + page.evaluate("JSON.stringify(localStorage) + document.cookie")
        page.reload()
        settled(page)
        other = page.context.new_page()
        other.goto(visitor.gateway.url)
        expect(other.get_by_label("Key", exact=True)).to_be_visible()
        other.close()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Key", exact=True)).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0
        assert "alder" not in page.locator("body").inner_text()


def test_a_key_that_loses_its_scope_and_then_its_life(browser: Browser, herd_yard: Yard) -> None:
    gateway = herd_yard.gateway
    keys = Path(gateway.environment["AUTH_KEYS_FILE"])
    before = keys.read_text()
    guest = "sk-guest-0123456789abcdefghijABCDEFGHIJ"
    try:
        keys.write_text(f"{before}guest:{guest} scope=infer,admin\n")
        eventually(lambda: gateway.get("/logs", key=guest).status == 200)
        with visit(browser, gateway) as visitor:
            page = visitor.page
            visitor.sign_in(guest)
            settled(page)
            expect(page.locator("#requests")).to_be_visible()
            keys.write_text(f"{before}guest:{guest}\n")
            expect(page.get_by_role("status").filter(has_text="has lost the scope admin")).to_be_visible()
            expect(page.locator("#requests")).not_to_be_visible()
            expect(page.locator("#link")).to_have_text("Live")
            assert set(visitor.refused()) <= {403}
            keys.write_text(before)
            expect(page.get_by_role("alert")).to_contain_text("key")
            expect(page.locator("#board")).not_to_be_visible()
            assert set(visitor.refused()) <= {401, 429}  # those who fail often are slowed down
    finally:
        keys.write_text(before)


# --- connection


def test_a_lost_connection_is_told_and_found_again(browser: Browser, chat_model: Path, tmp_path: Path) -> None:
    port = str(free_port())
    with (
        running_gateway(tmp_path, MODEL_PATH=str(chat_model), PORT=port) as gateway,
        visit(browser, gateway) as visitor,
    ):
        page = visitor.page
        visitor.sign_in()
        settled(page)
        gateway.stop()
        notice = page.get_by_role("status").filter(has_text="Not connected.")
        expect(notice).to_contain_text("What you see is how it was.")
        expect(page.locator("#link")).to_have_text("Not connected")
        expect(page.locator("#board")).to_have_class(re.compile("stale"))
        expect(visitor.model("tiny")).to_be_visible()
        expect(notice).to_contain_text(re.compile(r"Next try in \d+ s\."))
        notice.get_by_role("button", name="Try now").click()
        with running_gateway(tmp_path, MODEL_PATH=str(chat_model), PORT=port):
            page.evaluate("dispatchEvent(new Event('online'))")  # what the browser says when it has a network again
            settled(page)
            expect(notice).not_to_be_visible()
            assert all("ERR_" in line for line in visitor.trouble)
            visitor.trouble.clear()


def watchers(gateway: Gateway) -> int:
    """How many have a dashboard open, as the gateway tells them: by that they ask more seldom."""
    connection = HTTPConnection("127.0.0.1", gateway.port, timeout=10)
    connection.request("GET", "/metrics/stream", headers={"Authorization": f"Bearer {ADMIN}"})
    with contextlib.closing(connection), connection.getresponse() as reply:
        lines = [reply.readline() for _ in range(5)]  # the first snapshot may be from before it was counted
    assert lines[0] == lines[3] == b"event: snapshot\n"
    return int(json.loads(lines[4].removeprefix(b"data: "))["watchers"]) - 1  # this one


def test_a_hidden_tab_asks_for_nothing(browser: Browser, herd_yard: Yard) -> None:
    asked: list[str] = []
    hide = (
        "hidden => { Object.defineProperty(document, 'hidden', {configurable: true, get: () => hidden});"
        "document.dispatchEvent(new Event('visibilitychange')); }"
    )
    with visit(browser, herd_yard.gateway) as visitor:
        page = visitor.page
        visitor.sign_in()
        settled(page)
        eventually(lambda: watchers(visitor.gateway) == 1)
        page.evaluate(hide, True)
        expect(page.locator("#link")).to_have_text("Paused")
        eventually(lambda: watchers(visitor.gateway) == 0)
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(3500)  # longer than the shortest poll; there is no event for nothing
        assert asked == []
        page.evaluate(hide, False)
        settled(page)
        assert any(url.endswith("/v1/models/status/stream") for url in asked)


# --- for everybody


def test_the_keyboard_reaches_everything(browser: Browser, herd_yard: Yard) -> None:
    with visit(browser, herd_yard.gateway) as visitor:
        page = visitor.page
        page.goto(visitor.gateway.url)
        page.keyboard.type(ADMIN)
        page.keyboard.press("Enter")
        settled(page)
        outlines = {}
        for _ in range(60):
            page.keyboard.press("Tab")
            name = page.evaluate("document.activeElement.id || document.activeElement.ariaLabel")
            outlines[name] = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert {"Eject alder", "chat-text", "chat-model", "chat-log", "theme", "sign-out"} <= outlines.keys()
        assert outlines["theme"] == outlines["Eject alder"] == "solid"


def test_the_theme_is_chosen_and_kept(browser: Browser, herd_yard: Yard) -> None:
    with visit(browser, herd_yard.gateway, scheme="light") as visitor:
        page = visitor.page
        page.goto(visitor.gateway.url)
        button = page.get_by_role("button", name="Colours")
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        button.click()
        expect(button).to_have_text("Light")
        button.click()
        expect(button).to_have_text("Dark")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert dark != light
        page.reload()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


def test_the_page_comes_from_here_alone_and_is_small(browser: Browser, herd_yard: Yard) -> None:
    bodies: dict[str, int] = {}

    def fetched(route: Route) -> None:
        reply = route.fetch()
        bodies[route.request.url] = len(reply.body())
        route.fulfill(response=reply)

    with visit(browser, herd_yard.gateway) as visitor:
        page, url = visitor.page, visitor.gateway.url
        page.route(re.compile(r"/(dashboard/[\w.]+)?$"), fetched)
        page.goto(url)
        expect(page.get_by_label("Key", exact=True)).to_be_visible()
        page.unroute_all(behavior="wait")  # what is being fetched belongs to this page
        parts = {path.name for path in (ROOT / "gateway" / "http" / "dashboard").iterdir()}
        assert set(bodies) == {f"{url}/", *(f"{url}/dashboard/{name}" for name in parts - {"index.html"})}
        assert sum(bodies.values()) < 150_000
        assert page.evaluate("performance.getEntriesByType('resource').every(one => one.name.startsWith(origin))")


def test_the_policy_holds(browser: Browser, herd_yard: Yard) -> None:
    with visit(browser, herd_yard.gateway) as visitor:
        page = visitor.page
        page.goto(visitor.gateway.url)
        inline = "document.body.append(Object.assign(document.createElement('script'), {text: 'window.hit = 1'}))"
        with pytest.raises(Exception, match="TrustedScript"):
            page.evaluate(inline)
        with pytest.raises(Exception, match="TrustedHTML"):
            page.evaluate("document.body.innerHTML = '<img src=x>'")
        with pytest.raises(Exception, match="Failed to fetch"):
            page.evaluate("fetch('http://127.0.0.1:1/')")
        assert page.evaluate("window.hit") is None
        assert visitor.trouble
        visitor.trouble.clear()


def test_without_keys_nobody_is_asked_for_one(browser: Browser, chat_model: Path, tmp_path: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), AUTH_ENABLED="false") as gateway:
        with visit(browser, gateway) as visitor:
            visitor.page.goto(gateway.url)
            settled(visitor.page)
            expect(visitor.page.locator("#sign-out")).not_to_be_visible()
            expect(visitor.model("tiny").get_by_role("button", name="Eject tiny")).to_be_visible()
