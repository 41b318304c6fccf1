"""Fixtures for all tests: generated models once a session, real gateways once a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.make_model import Shape, make_model
from tests.house import Gateway, running_gateway


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
