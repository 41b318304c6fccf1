"""Two hundred keys at one model, on a virtual clock: who is served how much, how late, and what they were told."""

from __future__ import annotations

import pytest

from gateway.admission.order import AGING_BOUND
from tests.simulation import Outcome, crowd, simulate, within


def check(outcome: Outcome, spread: float) -> None:
    clients = outcome.clients
    assert len(clients) == 200
    assert all(client.arrived == client.served > 0 for client in clients), "a key starves"
    greedy = [client.tokens for client in clients if client.key.startswith("greedy")]
    assert (max(greedy) - min(greedy)) / max(greedy) <= spread
    double = [client.tokens for client in clients if client.weight == 2]
    assert sum(double) / len(double) == pytest.approx(2 * sum(greedy) / len(greedy), rel=0.05)
    # When its age has come it needs its turn, and its key may have had more than others just before.
    assert max(outcome.waits["low"]) <= AGING_BOUND
    assert sorted(outcome.waits["high"])[int(0.99 * len(outcome.waits["high"]))] < 1.0
    # Nobody can say of less than a second when one of sixteen places will be free; it is not worth a Retry-After.
    assert within([(told, waited) for told, waited in outcome.forecasts if waited > 1.0], 0.3) >= 0.85
    assert within(outcome.forecasts, 0.3) >= 0.8
    assert within(outcome.forecasts, 0.3, seconds=1.0) >= 0.85


@pytest.mark.timeout(60)
def test_two_hundred_keys() -> None:
    check(simulate(crowd(load=0.2), 200_000), spread=0.1)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_hundred_keys_and_a_million_requests() -> None:
    check(simulate(crowd(load=0.3), 1_000_000), spread=0.05)
