"""The decision as a table: what was read, and when, against what we say."""

from __future__ import annotations

import pytest

from health.decide import Json, judge, ping_code

NOW, WALL, STALE = 5000.0, 1_700_000_000.0, 10.0


def published(status: object = "ready", heartbeat: object = NOW, **more: object) -> Json:
    return {"status": status, "since": 12.5, "detail": "d", "models": {}, "heartbeat": heartbeat} | more


# what was read, our age in seconds, → status, /ping, a part of the detail
CASES: list[tuple[str, Json | None, float, str, int, str]] = [
    ("no file yet", None, 0, "starting", 204, "waiting"),
    ("no file, still young", None, STALE, "starting", 204, "waiting"),
    ("no file, old", None, STALE + 1, "failed", 503, "no gateway"),
    ("the entrypoint's word", {"status": "starting", "since": 1.0}, 59, "starting", 204, ""),
    ("the entrypoint's word, an hour ago", {"status": "starting", "since": 1.0}, 61, "failed", 503, "did not come up"),
    ("ready without a heartbeat", {"status": "ready"}, 1, "failed", 503, "did not come up"),
    ("starting", published("starting"), 300, "starting", 204, "d"),
    ("loading", published("loading"), 300, "loading", 204, "d"),
    ("ready", published("ready"), 300, "ready", 200, "d"),
    ("draining", published("draining"), 300, "draining", 503, "d"),
    ("stopped", published("stopped"), 300, "stopped", 503, "d"),
    ("failed", published("failed"), 300, "failed", 503, "d"),
    ("stopped long ago", published("stopped", NOW - 900), 300, "stopped", 503, "d"),
    ("failed, and gone since", published("failed", None), 300, "failed", 503, "d"),
    ("a heartbeat just in time", published(heartbeat=NOW - STALE), 300, "ready", 200, "d"),
    ("a stale heartbeat", published(heartbeat=NOW - 14), 300, "failed", 503, "no heartbeat from the gateway for 14 s"),
    ("a stale heartbeat while loading", published("loading", NOW - 14), 300, "failed", 503, "for 14 s"),
    ("a stale heartbeat while draining", published("draining", NOW - 14), 300, "failed", 503, "for 14 s"),
    ("a heartbeat from before a reboot", published(heartbeat=NOW + 900), 300, "failed", 503, "another boot"),
    ("clocks read in the wrong order", published(heartbeat=NOW + 0.01), 300, "ready", 200, "d"),
    ("a heartbeat that is a word", published(heartbeat="now"), 300, "failed", 503, "did not come up"),
    ("a heartbeat that is NaN", published(heartbeat=float("nan")), 300, "failed", 503, "did not come up"),
    ("a heartbeat that is true", published(heartbeat=True), 300, "failed", 503, "did not come up"),
    ("a heartbeat beyond floats", published(heartbeat=10**400), 300, "failed", 503, "did not come up"),
    ("an unknown word", published("splendid"), 300, "failed", 503, "unknown state 'splendid'"),
    ("no word at all", published(7), 300, "failed", 503, "unknown state"),
]


@pytest.mark.parametrize(("read", "age", "status", "code", "detail"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_judge(read: Json | None, age: float, status: str, code: int, detail: str) -> None:
    report = judge(read, now=NOW, wall=WALL, started=NOW - age, stale_after=STALE)
    assert (report.status, ping_code(report.status, liveness=False)) == (status, code)
    assert detail in report.detail
    assert ping_code(report.status, liveness=True) == 200
    assert set(report.health()) == {"status", "since", "detail", "models"}


def test_since_is_when_the_state_began() -> None:
    def since(read: Json | None, age: float) -> float:
        return judge(read, now=NOW, wall=WALL, started=NOW - age, stale_after=STALE).since

    assert since(published(), 300) == 12.5
    assert since(published(since="yesterday"), 300) == WALL - 300
    assert since(None, 4) == WALL - 4
    assert since(None, 14) == WALL - 4
    assert since(published(heartbeat=NOW - 14), 300) == WALL - 4
    assert since({"status": "starting"}, 75) == WALL - 15


def test_what_we_do_not_know_passes_through() -> None:
    report = judge(published(pid=7, queue=3), now=NOW, wall=WALL, started=NOW, stale_after=STALE)
    assert report.full() == published(pid=7, queue=3)


def test_a_dead_gateways_models_are_not_called_ready() -> None:
    models: Json = {"a": {"state": "ready", "status": "ready", "slots": 4}, "b": {"state": "off"}, "c": "odd"}
    report = judge(published(heartbeat=NOW - 99, models=models), now=NOW, wall=WALL, started=NOW, stale_after=STALE)
    failed = {"state": "failed", "status": "failed", "slots": 4}
    assert report.models == {"a": failed, "b": {"state": "off"}, "c": "odd"}


def test_models_that_are_no_object_are_none() -> None:
    assert judge(published(models=[1]), now=NOW, wall=WALL, started=NOW, stale_after=STALE).models == {}
