"""A real Chromium before a real gateway, and what it said while it was used."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from scripts.make_model import Shape, make_model
from tests.house import ADMIN, Gateway, llama_server
from tests.real.herd import Stage, herd, stage

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --force-color-profile=srgb"
).split()
Scheme = Literal["light", "dark"]
PATIENCE_MS = 10_000
SERIOUS = ("serious", "critical")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "there is no chromium: run the tests by ./scripts/test"
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visitor:
    """Somebody with the page open. `trouble` is what the browser complained about."""

    page: Page
    gateway: Gateway
    trouble: list[str] = field(default_factory=list)

    def sign_in(self, key: str = ADMIN) -> None:
        self.page.goto(self.gateway.url)
        self.page.get_by_label("Key", exact=True).fill(key)
        self.page.get_by_role("button", name="Sign in").click()

    def model(self, name: str) -> Any:
        heading = self.page.get_by_role("heading", name=name, exact=True)
        return self.page.locator("li.model").filter(has=heading)

    def refused(self) -> list[int]:
        """The statuses that the browser complained about; they are no trouble any more."""
        found = [re.search(r"status of (\d+)", line) for line in self.trouble]
        self.trouble = [line for line, match in zip(self.trouble, found, strict=True) if match is None]
        return [int(match[1]) for match in found if match]


@contextlib.contextmanager
def visit(browser: Browser, gateway: Gateway, width: int = 1280, scheme: Scheme = "light") -> Iterator[Visitor]:
    """A tab of its own. Whatever the browser complains about and the test did not ask for fails it at the end."""
    context: BrowserContext = browser.new_context(
        viewport={"width": width, "height": 900},
        is_mobile=width < 600,
        color_scheme=scheme,
        reduced_motion="reduce",
        locale="en-GB",
    )
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    visitor = Visitor(page, gateway)

    def said(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            visitor.trouble.append(message.text)

    page.on("console", said)
    page.on("pageerror", lambda error: visitor.trouble.append(str(error)))
    try:
        yield visitor
        assert not visitor.trouble, visitor.trouble
    finally:
        context.close()


@dataclass
class Yard:
    """A gateway with a herd. The model `gated` starts when `open_gate` is called, not before."""

    gateway: Gateway
    gate: Path
    stage: Stage

    def open_gate(self) -> None:
        self.gate.touch()

    def close_gate(self) -> None:
        self.gate.unlink(missing_ok=True)


@contextlib.contextmanager
def yard(folder: Path, slow: Path) -> Iterator[Yard]:
    for number, name in enumerate(("alder", "birch", "gated")):
        make_model(folder / f"{name}.gguf", seed=200 + number, shape=Shape(layers=2 + number))
    (folder / "broken.gguf").write_bytes(b"GGUF, but not for long")
    gate = folder / "gate"
    shut = f'while [ "$model$glance" = gated ] && [ ! -e {gate} ]; do sleep 0.02; done'
    staged = stage(folder, llama_server(), shut)
    models: dict[str, Any] = {
        "alder": {"model_path": str(folder / "alder.gguf"), "aliases": ["gpt-4o-mini"], "slots": 4},
        "birch": {"model_path": str(folder / "birch.gguf"), "slots": 2},
        "gated": {"model_path": str(folder / "gated.gguf"), "slots": 2},
        "slow": {"model_path": str(slow), "slots": 1},
        "broken": {"model_path": str(folder / "broken.gguf")},
    }
    more = {"LLAMA_SERVER_PATH": str(staged.path), "VRAM_BUDGET_MB": "800", "CTX": "4096"}
    with herd(folder / "gateway", models, {"preload_models": ["alder"]}, **more) as gateway:
        yield Yard(gateway, gate, staged)


def settled(page: Page) -> None:
    """Signed in, connected, and all parts have their data."""
    expect(page.locator("#link")).to_have_text("Live")
    expect(page.locator("#memory")).to_contain_text("booked")
    expect(page.locator(".figure").first).to_contain_text("Ready")
    expect(page.locator("#usage-body")).not_to_be_empty()


def violations(page: Page) -> list[str]:
    """What axe-core finds that would keep somebody out."""
    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {[node['target'] for node in one['nodes']]}" for one in found if one["impact"] in SERIOUS]


def off(gateway: Gateway, *models: str) -> None:
    for model in models:
        gateway.request("POST", "/v1/models/eject", {"model": model, "force": True}, key=ADMIN)
