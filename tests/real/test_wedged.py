"""A real llama-server that is alive but dead is ended, and who waited is served; one that works is left alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.house import ROOT, Gateway, eventually, running_gateway
from tests.real.wire import chat, request, wire

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

HASTE = """
import gateway.models.watchdog as watchdog
watchdog.WATCH_SECONDS, watchdog.WEDGED_SECONDS, watchdog._HEALTH_SECONDS = 0.2, 1.0, 0.3
"""


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory, slow_model: Path) -> Iterator[Gateway]:
    """A gateway with a watchdog that has less patience than usual."""
    folder = tmp_path_factory.mktemp("hasty")
    (folder / "sitecustomize.py").write_text(HASTE)
    path = f"{folder}{os.pathsep}{ROOT}"
    with running_gateway(
        folder, MODEL_PATH=str(slow_model), PYTHONPATH=path, PARALLEL="1", CTX="16384", EXTRA_ARGS="-b 16384"
    ) as gateway:
        yield gateway


def test_who_waited_for_a_wedged_server_is_served_by_the_next(hasty: Gateway) -> None:
    first = hasty.model()["pid"]
    os.kill(first, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(hasty.chat).result()
    assert answer.status == 200 and answer.json()["usage"]["completion_tokens"] == 8
    assert hasty.model()["pid"] != first
    eventually(lambda: "model.crashed: slow: llama-server is wedged: it does not answer" in hasty.stderr)


def test_one_that_works_for_a_client_that_has_left_is_left_alone(hasty: Gateway) -> None:
    """A long batch is finished although nobody wants it any more; that is work, and no wedge."""
    assert hasty.chat().status == 200
    first = hasty.model()["pid"]
    crashes = hasty.stderr.count("model.crashed")
    with wire(hasty) as client:
        turns = [{"role": "user", "content": "word " * 400}]
        client.send(request("POST", "/v1/chat/completions", chat(messages=turns, stream=True)))
        eventually(lambda: hasty.slots_busy() == 1)
    begun = time.monotonic()
    eventually(lambda: hasty.slots_busy() == 0, 30)
    assert time.monotonic() - begun > 2, "long enough to be taken for a wedge"
    assert hasty.model()["pid"] == first
    assert hasty.stderr.count("model.crashed") == crashes
