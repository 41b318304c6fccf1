"""One browser and one gateway with a herd for all tests of the dashboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser.kit import Yard, chromium, yard


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", action="store_true", help="write the pictures of docs/DASHBOARD.md anew")
    parser.addoption("--look", metavar="FOLDER", help="write a picture of each width and theme into this folder")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="package")
def herd_yard(tmp_path_factory: pytest.TempPathFactory, slow_model: Path) -> Iterator[Yard]:
    with yard(tmp_path_factory.mktemp("yard"), slow_model) as running:
        yield running
