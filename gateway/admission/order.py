"""Who is next: priorities that age, and inside a priority a fair share of the tokens for every key.

A pure structure: the clock is passed in, nothing is awaited. The rules, by number:

1. Of the levels high, normal and low, the highest in which anybody waits is served.
2. A lower one is due when its oldest has waited AGING_SECONDS for each level that it stands below. The levels that are
   due and the highest take turns, by requests. So what waits behind others by priority alone is at the latest after
   LONGEST_AGING given every third place, and within these its level's own order holds: that some are old must not
   put them before a young one whose key has had less.
3. Inside a level, each key has a line of its own and a tag: the tokens that it was served, by its weight, on the
   level's virtual clock. The line with the least tag is served, and its tag grows by the cost of what was served.
   What was expected is charged at the start and corrected when it is known.
4. A key that comes, or comes back, begins a usual request before the clock: it is soon served, behind those who came
   so before it, and gets nothing more for its absence. Its debts stay, until the clock has passed them, or nobody has
   had to wait for FORGIVE_SECONDS.
5. The clock goes on with what was really served, shared among all keys that wait or run: as far as the tag of a key
   that has just its share. However many new keys come, each begins later than the one before.

A key with no one waiting costs nothing once its debt is passed. Of a push, a pop and a removal each is O(log keys).
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict

AGING_SECONDS = 15.0
AGING_BOUND = 60.0  # the longest wait of a low one, as long as all low ones together ask for less than their third
FORGIVE_SECONDS = 10.0
HIGH, NORMAL, LOW = range(3)
LEVELS = {"high": HIGH, "normal": NORMAL, "low": LOW}
LONGEST_AGING = LOW * AGING_SECONDS
FADE = 0.999  # how the shares of the levels fade with each request
RATIO_STEP = 0.1
USUAL_STEP = 0.05
MOST_LOST = 0.8  # no forecast reckons with more than this being taken by those who come later
_SLACK = 64  # how many dead things are not worth a clearing


class Entry:
    """One who waits. `cost` is what it will likely take, in tokens; it arrives when it is pushed."""

    __slots__ = ("arrived", "cost", "key", "level", "line", "places", "weight")

    def __init__(self, key: str, level: int = NORMAL, weight: float = 1.0, cost: float = 1.0, places: int = 1) -> None:
        self.key = key
        self.level = level
        self.weight = weight
        self.cost = cost
        self.places = places
        self.arrived = 0.0
        self.line: _Line | None = None


class _Line:
    """One key's requests at one level, first come, first served."""

    __slots__ = ("backlog", "key", "open", "ratio", "running", "served", "spot", "tag", "waiting", "weight")

    def __init__(self, key: str, tag: float) -> None:
        self.key = key
        self.tag = tag  # where on the level's clock its next one begins
        self.weight = 1.0
        self.backlog = 0.0
        self.served = 0.0  # since it last was empty
        self.open = 0  # how many run, charged and not corrected yet
        self.running = 0.0  # the cost of these
        self.ratio: float | None = None  # what it took at the mean, of what was expected
        self.spot = 0  # the number of its item in the heap that is valid; 0: none
        self.waiting: OrderedDict[Entry, None] = OrderedDict()

    def matters(self, clock: float) -> bool:
        """Whether it is to be remembered: somebody waits or runs, or it has a debt."""
        return bool(self.waiting) or self.open > 0 or self.tag > clock

    def reached(self, ratio: float) -> float:
        """What part of the expected it takes; `ratio` is everybody's."""
        return ratio if self.ratio is None else self.ratio

    def settled(self, ratio: float) -> float:
        """Its tag as it will be when what runs is corrected."""
        return self.tag - self.running * (1.0 - self.reached(ratio)) / self.weight


class _Level:
    def __init__(self, aging: float) -> None:
        self.aging = aging  # seconds after which its oldest does not stand behind the levels above any more
        self.spent = self.fresh = 0.0  # faded sums of costs: all that was served, and to those who came just then
        self.usual = 0.0  # the cost of a request, at the mean
        self.turn = 0  # the number of the last pop that was its own
        self.ages: OrderedDict[Entry, None] = OrderedDict()  # all who wait, the oldest first
        self.clock = 0.0
        self.weight = 0.0  # of all lines of whom somebody waits or runs
        self.busy = 0  # lines in which somebody waits
        self.backlog = 0.0
        self.lines: dict[str, _Line] = {}
        self._heap: list[tuple[float, int, _Line]] = []
        self._spots = 0
        self._clear_at = _SLACK

    def push(self, entry: Entry) -> None:
        line = self.lines.get(entry.key)
        if line is None:
            if len(self.lines) >= self._clear_at:
                self._clear_lines()
            line = self.lines[entry.key] = _Line(entry.key, -math.inf)
        self.weight += entry.weight - (line.weight if line.waiting or line.open else 0.0)
        line.weight = entry.weight
        if not line.waiting:
            line.tag = max(line.tag, self.clock - (self.usual or entry.cost) / entry.weight)  # rule 4
            line.served = 0.0
            self.busy += 1
            self._queue(line)
        line.waiting[entry] = None
        self.ages[entry] = None
        line.backlog += entry.cost
        self.backlog += entry.cost
        entry.line = line

    def due(self, now: float) -> bool:
        return bool(self.busy) and next(iter(self.ages)).arrived <= now - self.aging

    def first(self) -> _Line:
        """Raises IndexError where nobody waits."""
        heap = self._heap
        while heap[0][1] != heap[0][2].spot:
            heapq.heappop(heap)
        return heap[0][2]

    def serve(self, line: _Line, entry: Entry) -> None:
        """`entry` is the first of `line`, which is the first of all."""
        line.tag += entry.cost / line.weight  # rule 3
        if not line.served:
            self.fresh += entry.cost
        line.served += entry.cost
        self.usual += USUAL_STEP * (entry.cost - self.usual) if self.usual else entry.cost
        line.open += 1
        line.running += entry.cost
        self.remove(entry)
        if line.waiting:
            self._queue(line)

    def remove(self, entry: Entry) -> None:
        line = entry.line
        assert line is not None
        del line.waiting[entry]
        del self.ages[entry]
        line.backlog -= entry.cost
        self.backlog -= entry.cost
        if not line.waiting:
            line.spot, line.backlog = 0, 0.0
            self.busy -= 1
            if not self.busy:
                self._heap.clear()
                self.backlog = 0.0  # what rounding has left
            self._rest(line)

    def correct(self, entry: Entry, tokens: float) -> None:
        line = entry.line
        assert line is not None
        line.open -= 1
        line.running = line.running - entry.cost if line.open else 0.0
        if entry.cost > 0:
            part = tokens / entry.cost
            line.ratio = part if line.ratio is None else line.ratio + RATIO_STEP * (part - line.ratio)
        line.tag += (tokens - entry.cost) / line.weight
        self.clock += tokens / self.weight  # rule 5
        if line.waiting:
            self._queue(line)
        self._rest(line)

    def _rest(self, line: _Line) -> None:
        if line.waiting or line.open:
            return
        self.weight -= line.weight
        if line.tag <= self.clock:
            del self.lines[line.key]
            if not self.lines:
                self.weight = 0.0

    def forgive(self) -> None:
        self.clock = max((line.tag for line in self.lines.values()), default=self.clock)
        self._clear_lines()

    def ahead(self, entry: Entry, now: float, ratio: float) -> tuple[float, float, bool]:
        """What is served before one who comes now, if nobody else comes, in tokens as they will really be;
        when the level will be due while it waits; and whether later ones will go before it."""
        own = self.lines.get(entry.key)
        tag, before = self.clock - (self.usual or entry.cost) / entry.weight, 0.0
        if own is not None:
            before = own.backlog * own.reached(ratio)
            tag = own.settled(ratio) + before / own.weight if own.waiting else max(tag, own.settled(ratio))
        due = now + self.aging
        for _, spot, line in self._heap:
            if spot != line.spot or line is own:
                continue
            at = line.settled(ratio)
            if at > tag:
                due = min(due, next(iter(line.waiting)).arrived + self.aging)
                continue
            backlog = line.backlog * line.reached(ratio)
            mean = backlog / len(line.waiting)
            share = max(mean, (tag - at) * line.weight + mean / 2)
            # One who has had more than it has waiting goes on asking, as far as one can tell.
            before += share if line.served > line.backlog else min(share, backlog)
        return before, due, tag > self.clock

    def _queue(self, line: _Line) -> None:
        self._spots = line.spot = self._spots + 1
        if len(self._heap) > 2 * self.busy + _SLACK:
            self._heap = [item for item in self._heap if item[1] == item[2].spot]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (line.tag, line.spot, line))

    def _clear_lines(self) -> None:
        self.lines = {key: line for key, line in self.lines.items() if line.matters(self.clock)}
        self._clear_at = 2 * len(self.lines) + _SLACK


class Order:
    """All who wait for one model. Times are in seconds on the caller's clock, which never goes back."""

    def __init__(self) -> None:
        self._levels = tuple(_Level(level * AGING_SECONDS) for level in (HIGH, NORMAL, LOW))
        self._count = 0
        self._turns = 0
        self._emptied_at = 0.0

    def __len__(self) -> int:
        return self._count

    def push(self, entry: Entry, now: float) -> None:
        if not self._count and now - self._emptied_at > FORGIVE_SECONDS:  # rule 4
            for level in self._levels:
                level.forgive()
        self._count += 1
        entry.arrived = now
        self._levels[entry.level].push(entry)

    def peek(self, now: float) -> Entry | None:
        return next(iter(self._chosen(now).first().waiting)) if self._count else None

    def pop(self, now: float) -> Entry:
        """Takes the next one out and charges its key. Raises IndexError where nobody waits."""
        level = self._chosen(now)
        line = level.first()
        entry = next(iter(line.waiting))
        self._turns = level.turn = self._turns + 1
        for each in self._levels:
            each.spent *= FADE
            each.fresh *= FADE
        level.spent += entry.cost
        level.serve(line, entry)
        self._left(now)
        return entry

    def remove(self, entry: Entry, now: float) -> None:
        """It does not wait any more, and is charged nothing."""
        self._levels[entry.level].remove(entry)
        self._left(now)

    def correct(self, entry: Entry, tokens: float) -> None:
        """One that was popped has taken so many tokens, not what was expected. To be called once."""
        self._levels[entry.level].correct(entry, tokens)

    def ahead(self, ticket: Entry, now: float, ratio: float, speed: float) -> float:
        """The tokens to be served before one who comes now, as they will really be. O(keys that wait).

        `ratio`: what part of the expected is really taken, at the mean; `speed`: tokens a second, of all places.
        """
        level = self._levels[ticket.level]
        own, due, overtaken = level.ahead(ticket, now, ratio)
        others = lost = 0.0
        for number, other in enumerate(self._levels):
            if number < ticket.level:
                others += min(other.backlog * ratio, own + max(0.0, due - now) * speed)
                lost += other.spent
            elif number > ticket.level and other.due(now):
                others += min(other.backlog * ratio, own)  # they take turns
        if overtaken:
            lost += level.fresh
        total = sum(each.spent for each in self._levels)
        share = min(MOST_LOST, lost / total) if total else 0.0
        # Once its level is due it gets its turns, whatever comes.
        longest = max(0.0, due - now) * speed + len(self._levels) * own
        return min((own + others) / (1.0 - share), longest)

    def backlog(self) -> float:
        """The expected tokens of all who wait."""
        return sum(level.backlog for level in self._levels)

    def _chosen(self, now: float) -> _Level:
        chosen: _Level | None = None
        for level in self._levels:
            if level.busy and (chosen is None or (level.turn < chosen.turn and level.due(now))):  # rules 1, 2
                chosen = level
        if chosen is None:
            raise IndexError("nobody waits")
        return chosen

    def _left(self, now: float) -> None:
        self._count -= 1
        if not self._count:
            self._emptied_at = now
