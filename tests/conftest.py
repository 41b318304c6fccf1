"""Fixtures for all tests: generated models once a session, real gateways once a module."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest
import uvloop

from scripts.make_model import Shape, make_model
from tests.house import Gateway, running_gateway

hypothesis.settings.register_profile("corral", deadline=None)  # a loaded machine is no failure
hypothesis.settings.load_profile("corral")

TEST_SECONDS = 9.0  # a little less than the limit in pyproject.toml


def bounded_uvloop() -> asyncio.AbstractEventLoop:
    """pytest's own time limit is a signal, which does not reach a test that waits in uvloop."""
    loop = uvloop.new_event_loop()
    loop.call_later(TEST_SECONDS, lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
    return loop


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": bounded_uvloop,
}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """A module with `LOOPS = ("asyncio", "uvloop")` is run on both; the gateway itself runs on uvloop."""
    module = item.getparent(pytest.Module)
    return {name: LOOPS[name] for name in getattr(module and module.obj, "LOOPS", ("asyncio",))}


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.5 MB of random weights that answer with words, thousands of tokens a second."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_model(path, seed=1)
    return path


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 MB; some 200 tokens a second on one core, so that an answer of 10,000 tokens is still running when we look."""
    path = tmp_path_factory.mktemp("models") / "slow.gguf"
    make_model(path, seed=3, shape=Shape(layers=8, embd=512, heads=8, kv_heads=8))
    return path


@pytest.fixture(scope="session")
def embedding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "embed.gguf"
    make_model(path, seed=2, embedding=True)
    return path


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    """A gateway before a real llama-server, shared by a module's tests; it has no request limit."""
    with running_gateway(tmp_path_factory.mktemp("gateway"), MODEL_PATH=str(chat_model)) as running:
        yield running
