"""What to believe of the published state: a pure function of what was read and of the clocks."""

from __future__ import annotations

STARTING_PATIENCE = 60.0  # seconds from our start in which the gateway may import, check and write its first word
CLOCK_SLACK = 1.0  # a heartbeat further ahead than this comes from before a reboot, not from a live gateway

READY = frozenset({"ready"})
INITIALISING = frozenset({"starting", "loading"})
ENDED = frozenset({"stopped", "failed"})
KNOWN = READY | INITIALISING | ENDED | {"draining"}

Json = dict[str, object]


class Report:
    """What we stand for at one moment. `believed` is False where it contradicts or replaces what was published."""

    __slots__ = ("believed", "detail", "models", "rest", "since", "status")

    def __init__(self, status: str, since: float, detail: str, published: Json, *, believed: bool = True) -> None:
        models = published.get("models")
        self.status = status
        self.since = since
        self.detail = detail
        self.models: Json = models if isinstance(models, dict) else {}
        self.rest = published
        self.believed = believed
        if not believed and status == "failed":
            self.models = {name: _failed(model) for name, model in self.models.items()}

    def health(self) -> Json:
        return {"status": self.status, "since": self.since, "detail": self.detail, "models": self.models}

    def full(self) -> Json:
        """Everything that was published, with our own word where the two differ."""
        return {**self.rest, **self.health()}


def _failed(model: object) -> object:
    # A model behind a gateway that is gone or hangs cannot be reached, whatever was last said of it.
    if isinstance(model, dict) and model.get("state") != "off":
        return {**model, "state": "failed", "status": "failed"}
    return model


def ping_code(status: str, *, liveness: bool) -> int:
    if liveness or status in READY:
        return 200
    return 204 if status in INITIALISING else 503


def judge(published: Json | None, *, now: float, wall: float, started: float, stale_after: float) -> Report:
    """`now` and `started` (our own start) are monotonic, `wall` is Unix time; all in seconds.

    1. Nothing was ever readable: starting while we are younger than `stale_after`, then failed.
    2. An end state needs no heartbeat: it promises nothing, and its writer is allowed to be gone.
    3. No heartbeat yet, which is how entrypoint.sh announces the gateway: starting for a minute, then failed.
    4. A heartbeat that is too old, or from the future: failed.
    5. Otherwise what was published, if we know the word.
    """
    age = now - started
    if published is None:  # 1
        if age <= stale_after:
            return Report("starting", wall - age, "waiting for the gateway", {}, believed=False)
        return Report("failed", wall - age + stale_after, f"no gateway: no state for {age:.0f} s", {}, believed=False)

    status = published.get("status")
    detail = published.get("detail")
    word = status if isinstance(status, str) else ""
    text = detail if isinstance(detail, str) else ""
    since = _number(published.get("since"))
    if since is None:
        since = wall - age
    if word in ENDED:  # 2
        return Report(word, since, text, published)

    heartbeat = _number(published.get("heartbeat"))
    if heartbeat is None:  # 3
        if word == "starting" and age <= STARTING_PATIENCE:
            return Report(word, since, text, published)
        late = wall - max(0.0, age - STARTING_PATIENCE)
        return Report("failed", late, f"the gateway did not come up within {age:.0f} s", published, believed=False)

    silence = now - heartbeat
    if silence > stale_after:  # 4
        reason = f"no heartbeat from the gateway for {silence:.0f} s"
        return Report("failed", wall - (silence - stale_after), reason, published, believed=False)
    if silence < -CLOCK_SLACK:
        return Report("failed", since, "the heartbeat is from another boot of this machine", published, believed=False)
    if word not in KNOWN:  # 5
        return Report("failed", since, f"unknown state {word!r}", published, believed=False)
    return Report(word, since, text, published)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < 1e15 else None  # refuses NaN and infinities too
