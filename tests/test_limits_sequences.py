"""Any sequence of reservations, settlements, refunds and losses, against an oracle that remembers everything."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission.budgets import DAY_SECONDS, MemoryBudgets
from gateway.admission.limits import Claim, Limits, Reservation
from gateway.errors import ConcurrencyExceeded, InsufficientQuota, RateLimitExceeded, TokensExceeded

RPM, TPM, CONCURRENCY, BUDGET = 4, 100, 3, 300
WINDOW = 60.0

operations = st.one_of(
    st.tuples(st.just("reserve"), st.sampled_from("ab"), st.integers(1, 110)),
    st.tuples(st.just("reserve"), st.just("a"), st.integers(1, 20)),
    st.tuples(st.just("settle"), st.integers(0, 20), st.integers(0, 150)),
    st.tuples(st.just("refund"), st.integers(0, 20)),
    st.tuples(st.just("lose"), st.integers(0, 20)),
    st.tuples(st.just("advance"), st.integers(0, 100)),
)


@dataclass(eq=False)
class Known:
    """What the oracle knows of one reservation."""

    who: str
    tokens: int
    at: float
    reservation: Reservation | None
    request: int = 1
    surplus: int = 0
    surplus_at: float = 0.0
    used: int = 0
    held: bool = True


class Oracle:
    def __init__(self) -> None:
        self.now = 0.0
        self.store = MemoryBudgets()
        self.limits = Limits(lambda: self.now, lambda: 100.0 * DAY_SECONDS + self.now / 1000, self.store)
        self.all: list[Known] = []

    def of(self, who: str) -> list[Known]:
        return [known for known in self.all if known.who == who]

    def requests(self, who: str, at: float) -> int:
        return sum(known.request for known in self.of(who) if known.at > at - WINDOW)

    def tokens(self, who: str, at: float) -> int:
        own = sum(known.tokens for known in self.of(who) if known.at > at - WINDOW)
        return own + sum(known.surplus for known in self.of(who) if known.surplus_at > at - WINDOW)

    def expected(self, who: str, tokens: int) -> type[Exception] | None:
        used = sum(known.used for known in self.of(who) if not known.held)
        if used + tokens > BUDGET or used >= BUDGET:
            return InsufficientQuota
        if tokens > TPM:
            return TokensExceeded
        if self.requests(who, self.now) >= RPM or self.tokens(who, self.now) + tokens > TPM:
            return RateLimitExceeded
        running = [known.tokens for known in self.of(who) if known.held]
        if len(running) >= CONCURRENCY or used + sum(running) + tokens > BUDGET:
            return ConcurrencyExceeded
        return None

    def reserve(self, who: str, tokens: int) -> None:
        expected = self.expected(who, tokens)
        try:
            reservation = self.limits.reserve(Claim(who, RPM, TPM, CONCURRENCY, BUDGET, tokens))
        except (RateLimitExceeded, TokensExceeded) as error:
            assert expected in (RateLimitExceeded, TokensExceeded)
            if error.retry_after is not None and "x-should-retry" not in error.headers():
                self.check_wait(who, tokens, self.now + error.retry_after)
        except (InsufficientQuota, ConcurrencyExceeded) as error:
            assert type(error) is expected
        else:
            assert expected is None
            self.all.append(Known(who, tokens, self.now, reservation))

    def check_wait(self, who: str, tokens: int, at: float) -> None:
        assert self.requests(who, at) < RPM and self.tokens(who, at) + tokens <= TPM, "told too early a time"
        early = at - 0.001
        late = self.requests(who, early) < RPM and self.tokens(who, early) + tokens <= TPM
        assert not late, "told too late a time"

    def end(self, known: Known, name: str, used: int) -> None:
        reservation = known.reservation
        if name == "lose":
            known.reservation = None
        elif reservation is not None:
            reservation.settle(used) if name == "settle" else reservation.refund()
        if not known.held or (reservation is None):
            return
        known.held = False
        if name == "refund":
            known.request = known.tokens = 0
        elif name == "lose":
            known.used = known.tokens
        else:
            known.used, known.surplus, known.surplus_at = used, max(0, used - known.tokens), self.now
            known.tokens = min(known.tokens, used)

    def check(self) -> None:
        for who in "ab":
            caller = self.limits._callers.get(who)
            if caller is None:
                assert not self.of(who) or self.of(who)[-1].at <= self.now - WINDOW
                continue
            caller.requests.pass_to(self.now)
            assert caller.requests.total == self.requests(who, self.now)
            assert len(caller.leases) == sum(known.held for known in self.of(who))
            if caller.day is not None:
                assert caller.day.held == sum(known.tokens for known in self.of(who) if known.held)
                assert caller.day.used == self.store.load(who, 100) == sum(known.used for known in self.of(who))
            if caller.tokens is not None:
                caller.tokens.pass_to(self.now)
                assert caller.tokens.total == self.tokens(who, self.now)


@settings(max_examples=300)
@given(st.lists(operations, max_size=60))
def test_it_agrees_with_an_oracle_and_leaves_nothing(sequence: list[tuple[str, *tuple[int | str, ...]]]) -> None:
    oracle = Oracle()
    for name, *how in sequence:
        if name == "reserve":
            oracle.reserve(str(how[0]), int(how[1]))
        elif name == "advance":
            oracle.now += int(how[0]) / 4
        elif oracle.all:
            oracle.end(oracle.all[int(how[0]) % len(oracle.all)], name, int(how[-1]))
        oracle.check()
    for known in oracle.all:
        oracle.end(known, "settle", 0)
    oracle.now += WINDOW
    oracle.check()
    for caller in oracle.limits._callers.values():
        assert caller.requests.total == 0 and not caller.leases and (caller.day is None or caller.day.held == 0)
        assert caller.tokens is None or caller.tokens.total == 0
    for number in range(100):
        oracle.limits.reserve(Claim(f"new {number}", rpm=1))
    assert not {"a", "b"} & oracle.limits._callers.keys()
