"""The images, built once a session, and a container that a module's tests may share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.image.base import NAMES, provide_base
from tests.image.engine import Container, Engine, model, running_container


@dataclass(frozen=True)
class Images:
    """Ids, and how long it took to have them."""

    base: str
    cpu: str
    cuda: str
    seconds: float


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine()


@pytest.fixture(scope="session")
def images(engine: Engine) -> Images:
    begun = time.monotonic()
    with engine.locked():
        provide_base(engine)
        cpu, cuda = engine.build("Dockerfile.cpu"), engine.build("Dockerfile")
        engine.prune()
    return Images(NAMES[0], cpu, cuda, time.monotonic() - begun)


@pytest.fixture(scope="module")
def container(
    engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory, chat_model: Path
) -> Iterator[Container]:
    """The CPU image with a model and nothing else that could be left out."""
    folder = tmp_path_factory.mktemp("container")
    with running_container(engine, images.cpu, folder, *model(chat_model)) as running:
        yield running
