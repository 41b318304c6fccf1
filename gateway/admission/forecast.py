"""How long one who comes now will wait: from what places were held for, and for how many expected tokens.

Work is counted in place-seconds: one place held for a second. What a request will take is its expected tokens at the
measured price of one, so that a model whose answers end long before their bound is not thought slower than it is.
"""

from __future__ import annotations

FADE = 0.99  # what a past request still counts for after the next: the last hundred or so decide
ENOUGH = 20  # requests that must have been measured before anybody is turned away on a forecast
BIAS_STEP = 1.001
MOST_BIAS = 4.0
FIRST_GUESS = 1.0  # seconds a place is held, before anything was measured


class Forecast:
    """The measured price of a model's work, and what is running. Tokens are as they really were, not as expected."""

    __slots__ = (
        "_begun",
        "_expected",
        "_held",
        "_held_squares",
        "_running",
        "_seconds",
        "_tokens",
        "_weight",
        "bias",
        "measured",
    )

    def __init__(self) -> None:
        self.measured = 0
        # Faded sums: of requests, expected tokens, tokens, place-seconds, seconds from begin to end and their squares.
        self._weight = self._expected = self._tokens = self._seconds = self._held = self._held_squares = 0.0
        self._running = 0.0  # the expected tokens of all that run
        self._begun = 0.0  # the sum of when their places were taken
        self.bias = [1.0, 1.0, 1.0]  # by level: what is not reckoned with, such as when later ones will come

    @property
    def known(self) -> bool:
        return self.measured >= ENOUGH

    @property
    def ratio(self) -> float:
        """What part of the expected is really taken."""
        return self._tokens / self._expected if self._tokens > 0 and self._expected > 0 else 1.0

    @property
    def price(self) -> float:
        """Place-seconds a token."""
        return self._seconds / self._tokens if self._tokens > 0 and self._seconds > 0 else FIRST_GUESS

    @property
    def tokens_per_second(self) -> float:
        """Of one place; 0 while nothing was measured."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0

    @property
    def mean_held(self) -> float:
        """Seconds."""
        return self._held / self._weight if self._weight else FIRST_GUESS

    def started(self, now: float, places: int, cost: float) -> None:
        self._running += cost
        self._begun += now * places

    def restarted(self, begun: float, now: float, places: int) -> None:
        """What began at `begun` really begins now: until now its model was being loaded."""
        self._begun += (now - begun) * places

    def finished(self, held: float, begun: float, places: int, cost: float, tokens: float) -> None:
        self.measured += 1
        self._running -= cost
        self._begun -= begun * places
        self._weight = self._weight * FADE + 1.0
        self._expected = self._expected * FADE + cost
        self._tokens = self._tokens * FADE + tokens
        self._seconds = self._seconds * FADE + held * places
        self._held = self._held * FADE + held
        self._held_squares = self._held_squares * FADE + held * held

    @property
    def running(self) -> tuple[float, float]:
        """Of all that run: the expected tokens, and the sum of when their places were taken."""
        return self._running, self._begun

    def idle(self) -> None:
        """Nothing runs: what rounding has left goes."""
        self._running = self._begun = 0.0

    def saw(self, level: int, predicted: float, waited: float) -> None:
        """How good a forecast was. A step up or down, so that half of all come too early whatever the worst do."""
        bias = self.bias[level] * BIAS_STEP if waited > predicted else self.bias[level] / BIAS_STEP
        self.bias[level] = min(MOST_BIAS, max(1 / MOST_BIAS, bias))

    def wait(self, ahead: float, places: int, capacity: int, active: int, now: float) -> float:
        """Seconds until `places` are free, with `ahead` tokens to be served before."""
        price = self.price
        left = max(0.0, price * self.ratio * self._running - (active * now - self._begun))
        # When its turn comes the other places are in the middle of something. How much is then left of that is what
        # one finds who looks at a random moment: the longer a request, the likelier it is the one that is found.
        rest = self._held_squares / (2 * self._held) if self._held > 0 else FIRST_GUESS / 2
        others = max(0, capacity - places)
        work = left + price * ahead
        return max((work - others * rest) / capacity, work / (capacity * (others + 1)))
