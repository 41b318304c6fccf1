"""How long a request will wait, foretold when it comes and compared with how long it waited, on a real llama-server."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from gateway.admission.forecast import Forecast
from gateway.environment import load_settings
from gateway.logs import logging_to
from gateway.pipeline.call import Call, read_fields
from gateway.pipeline.events import collected
from gateway.pipeline.identity import identity
from gateway.pipeline.routes import ROUTES
from gateway.runtime import Runtime, open_runtime
from gateway.stores.keys.file import Key
from tests.house import free_port, llama_server, soon

pytestmark = [pytest.mark.real, pytest.mark.timeout(100)]

CLIENTS = 12
REQUESTS = 8  # of each
TRIES = 3
SHORTEST = 0.05  # seconds; of less it cannot be told when a slot will be free


async def ask(runtime: Runtime, key: Key, tokens: int) -> None:
    request_id, traceparent = identity(None, None)
    now = asyncio.get_running_loop().time()
    call = Call(ROUTES["/completion"], key, key.id, request_id, traceparent, now, None, {}, 100, transport="test")
    read_fields(call, b'{"prompt": "tell me of %b", "n_predict": %d}' % (key.id.encode(), tokens))
    answer, record = await collected(runtime.spine, call, runtime.accounts.meter(1))
    assert answer.body
    assert record.usage.completion == tokens


async def client(runtime: Runtime, number: int) -> None:
    """Answers of all lengths, one after the other."""
    chosen, key = random.Random(number), Key(id=f"key-{number}")
    for _ in range(REQUESTS):
        await ask(runtime, key, chosen.randint(4, 30))
        await asyncio.sleep(chosen.random() * 0.2)


@pytest.mark.slow
async def test_a_forecast_is_within_a_factor_of_two(
    tmp_path: Path, slow_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For 80 % of those who wait; the best of three tries counts, for others use this machine too."""
    told: list[tuple[float, float]] = []
    saw = Forecast.saw

    def note(self: Forecast, level: int, predicted: float, waited: float) -> None:
        told.append((predicted, waited))
        saw(self, level, predicted, waited)

    monkeypatch.setattr(Forecast, "saw", note)
    environment = {
        "DATA_DIR": str(tmp_path),
        "MODEL_PATH": str(slow_model),
        "LLAMA_SERVER_PATH": str(llama_server()),
        "PORT_BACKEND": str(free_port()),
        "AUTH_ENABLED": "false",
        "MAX_REQUESTS_PER_MINUTE": "0",
        "PARALLEL": "2",
        "CTX": "1024",
        "NGL": "0",
        "THREADS": "1",
    }
    settings = load_settings(environment, dotenv=None)
    shares: list[float] = []
    with logging_to(tmp_path, "test", level="WARNING", as_json=False, secrets=[]) as logs:
        async with open_runtime(settings, logs) as runtime:
            runtime.accept()
            await soon(lambda: runtime.manager.loaded(), 20)
            while len(shares) < TRIES and max(shares, default=0.0) < 0.8:
                told.clear()
                async with asyncio.TaskGroup() as group:
                    for number in range(CLIENTS):
                        group.create_task(client(runtime, number))
                real = [(predicted, waited) for predicted, waited in told if waited > SHORTEST]
                assert len(real) > CLIENTS * REQUESTS / 2, "most had to wait, and were told how long"
                shares.append(sum(waited / 2 <= predicted <= 2 * waited for predicted, waited in real) / len(real))
    assert max(shares) >= 0.8, shares
