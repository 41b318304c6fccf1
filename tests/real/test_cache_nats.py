"""Jobs from JetStream meet the response cache, as requests do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.house import ADMIN, running_gateway
from tests.nats_kit import office, running_nats, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_second_job_is_a_hit(tmp_path: Path, chat_model: Path, stream: bool) -> None:
    variables = {"MODEL_PATH": str(chat_model), "CACHE_ENABLED": "true"}
    with (
        running_nats(tmp_path / "nats") as server,
        running_gateway(tmp_path / "house", variables, NATS_URL=server.url) as gateway,
    ):
        async with office(server) as here:
            about: dict[str, Any] = {"input": "hi", "params": {"max_tokens": 5, "temperature": 0}, "stream": stream}
            one, two = [await here.ask("tiny", name, **about) for name in ("one", "two")]
            assert {name: one[name] == two[name] for name in ("text", "tokens_in", "tokens_out")} == dict.fromkeys(
                ("text", "tokens_in", "tokens_out"), True
            )
            assert two["tokens_out"] == 5
            assert [len(here.tokens.get(name, ())) for name in ("one", "two")] == ([5, 5] if stream else [0, 0])
        found: list[dict[str, Any]] = []

        def recorded() -> bool:
            found[:] = gateway.get("/logs", key=ADMIN).json()["logs"]
            return len(found) == 2

        await until(recorded)
        assert [(row["transport"], row["cache"], row["tokens_out"]) for row in found] == [
            ("nats", "hit", 0),
            ("nats", "miss", 5),
        ]
