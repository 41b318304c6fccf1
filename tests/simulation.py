"""A model, two hundred keys and a virtual clock, around the queue's own order and forecast."""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from dataclasses import dataclass, field

from gateway.admission.forecast import Forecast
from gateway.admission.order import LEVELS, Entry, Order

CAPACITY = 16
TOKENS_PER_SECOND = 50.0  # of one place
SAMPLED = 10  # of so many requests one is asked for its forecast


@dataclass(eq=False)
class Client:
    """One key. `backlog` requests wait or run at every moment; or else they come at random, `rate` a second."""

    key: str
    bound: int  # its mean expected tokens
    reached: float  # what part of that its answers reach, at the mean
    priority: str = "normal"
    weight: float = 1.0
    backlog: int = 0
    rate: float = 0.0
    arrived: int = 0
    served: int = 0
    tokens: float = 0.0
    longest_wait: float = 0.0


class Request(Entry):
    __slots__ = ("begun", "client", "predicted", "tokens")

    def __init__(self, client: Client, cost: float, tokens: float, predicted: float | None) -> None:
        super().__init__(client.key, LEVELS[client.priority], client.weight, cost)
        self.client = client
        self.tokens = tokens
        self.predicted = predicted
        self.begun = 0.0


@dataclass
class Outcome:
    clients: list[Client]
    seconds: float = 0.0
    waits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by priority
    forecasts: list[tuple[float, float]] = field(default_factory=list)  # predicted, and as it was
    kinds: list[str] = field(default_factory=list)  # of clients: whose forecasts these were
    most_waiting: int = 0


def simulate(clients: list[Client], requests: int, seed: int = 1, capacity: int = CAPACITY) -> Outcome:
    """Until so many were served; all that is in the queue by then is served as well."""
    return _Simulation(clients, requests, seed, capacity).run()


class _Simulation:
    def __init__(self, clients: list[Client], requests: int, seed: int, capacity: int) -> None:
        self.random = random.Random(seed)
        self.left = requests
        self.capacity = capacity
        self.active = 0
        self.now = 0.0
        self.order, self.forecast = Order(), Forecast()
        self.outcome = Outcome(clients)
        self.events: list[tuple[float, int, Client | Request]] = []
        self.number = 0

    def run(self) -> Outcome:
        for client in self.outcome.clients:
            for _ in range(client.backlog):
                self.arrive(client)
            if client.rate:
                self.later(self.random.expovariate(client.rate), client)
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            if isinstance(event, Request):
                self.finish(event)
            elif self.left > 0:
                self.arrive(event)
                self.later(self.random.expovariate(event.rate), event)
        assert self.active == 0 and len(self.order) == 0
        self.outcome.seconds = self.now
        return self.outcome

    def later(self, seconds: float, event: Client | Request) -> None:
        self.number += 1
        heapq.heappush(self.events, (self.now + seconds, self.number, event))

    def arrive(self, client: Client) -> None:
        self.left -= 1
        client.arrived += 1
        cost = client.bound * self.random.uniform(0.5, 1.5)
        tokens = cost * min(1.0, client.reached * self.random.uniform(0.5, 1.5))
        predicted = self.predict(client, cost) if self.left % SAMPLED == 0 and self.forecast.known else None
        self.order.push(Request(client, cost, tokens, predicted), self.now)
        self.outcome.most_waiting = max(self.outcome.most_waiting, len(self.order))
        self.grant()

    def predict(self, client: Client, cost: float) -> float:
        if self.active < self.capacity and not len(self.order):
            return 0.0
        forecast = self.forecast
        asking = Entry(client.key, LEVELS[client.priority], client.weight, cost)
        ahead = self.order.ahead(asking, self.now, forecast.ratio, self.capacity / forecast.price)
        return forecast.bias[asking.level] * forecast.wait(ahead, 1, self.capacity, self.active, self.now)

    def grant(self) -> None:
        while self.active < self.capacity and len(self.order):
            request = self.order.pop(self.now)
            assert isinstance(request, Request)
            self.active += 1
            request.begun = self.now
            self.forecast.started(self.now, 1, request.cost)
            waited = self.now - request.arrived
            self.outcome.waits[request.client.priority].append(waited)
            request.client.longest_wait = max(request.client.longest_wait, waited)
            if request.predicted is not None:
                self.outcome.forecasts.append((request.predicted, waited))
                self.outcome.kinds.append(request.client.key.split("-")[0])
                self.forecast.saw(request.level, request.predicted, waited)
            self.later(request.tokens / TOKENS_PER_SECOND, request)

    def finish(self, request: Request) -> None:
        self.active -= 1
        client = request.client
        client.served += 1
        if self.left > 0:
            client.tokens += request.tokens  # of the time when all were there
        held = self.now - request.begun
        self.forecast.finished(held, request.begun, 1, request.cost, request.tokens)
        self.order.correct(request, request.tokens)
        self.grant()
        if client.backlog and self.left > 0:
            self.arrive(client)


def within(forecasts: list[tuple[float, float]], part: float, seconds: float = 0.0) -> float:
    """The share of forecasts that are off by no more than this part of the wait, or by so many seconds."""
    good = sum(abs(predicted - waited) <= max(part * waited, seconds) for predicted, waited in forecasts)
    return good / len(forecasts)


def crowd(load: float = 0.0, seed: int = 7) -> list[Client]:
    """Two hundred keys: greedy ones that always have more, and others that come at random.

    `load`: what part of the model's time those at random ask for, altogether; the greedy ones take what is left.
    """
    chosen = random.Random(seed)
    clients = [
        Client(f"greedy-{n}", chosen.choice((50, 200, 1000)), chosen.uniform(0.3, 1.0), backlog=chosen.randint(3, 8))
        for n in range(100)
    ]
    clients += [Client(f"double-{n}", 300, 0.6, weight=2.0, backlog=5) for n in range(10)]
    kinds = ["normal"] * 50 + ["high"] * 20 + ["low"] * 20
    share = load * CAPACITY * TOKENS_PER_SECOND / len(kinds)
    for n, priority in enumerate(kinds):
        bound, reached = chosen.choice((50, 200, 1000)), chosen.uniform(0.3, 1.0)
        clients.append(Client(f"{priority}-{n}", bound, reached, priority, rate=share / (bound * reached)))
    return clients
