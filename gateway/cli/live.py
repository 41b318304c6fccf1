"""What the models do, as it happens: the stream of their states, a screen that follows it, a bar while one loads."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from gateway.cli.client import Client, Failed, Unreachable, one_line
from gateway.cli.table import ago, state, table, why

STREAM = "/v1/models/status/stream"
AGAIN_SECONDS = 1.0  # between two attempts to reach a gateway that has gone
_BAR_WIDTH = 24

Row = dict[str, Any]


class NotLoaded(Failed):
    """A model did not come up, and this is why."""


def follow(client: Client, *, patient: bool = False) -> Iterator[tuple[str, Any]]:
    """(name, data) of the stream's events, for ever; it is opened anew when it ends.

    Raises Failed where the gateway cannot be reached. If `patient`, that holds for the first time only: later on the
    event `lost`, with the reason, says so, and it is tried again.
    """
    reached = False
    while True:
        try:
            for name, data in client.events(STREAM):
                reached = True
                yield name, data
        except Unreachable as error:
            if not (reached and patient):
                raise
            yield "lost", str(error)
        time.sleep(AGAIN_SECONDS)


class Herd:
    """What the stream has told so far, of the models wanted (None: all)."""

    def __init__(self, wanted: Sequence[str] | None = None) -> None:
        self.server = "unknown"
        self.models: dict[str, Row] = {}
        self.lost: str | None = None
        self._wanted = wanted

    def take(self, name: str, data: Any) -> list[str]:
        """The lines that say what is new in an event."""
        before, models = self._told(), dict(self.models)
        self.lost = data if name == "lost" else None
        if name == "full_status":
            self.server, models = str(data["server"]["status"]), dict(data["models"])
        elif name == "server_update":
            self.server = str(data["status"])
        elif name == "model_update":
            models[data["id"]] = data
        self.models = {key: row for key, row in models.items() if self._wanted is None or key in self._wanted}
        after = self._told()
        gone = [f"{key} is gone" for key in before if key not in after]
        return gone + [line for key, line in after.items() if before.get(key) != line]

    def _told(self) -> dict[str, str]:
        about = {"": f"connection lost: {self.lost}" if self.lost else f"the gateway is {self.server}"}
        for key, row in self.models.items():
            reason = why(row)
            about[key] = one_line(f"{key} is {state(row)}" + (f": {reason}" if reason else ""))
        return about

    def lines(self) -> list[str]:
        """The whole picture."""
        rows = [
            [key, state(row), row.get("vram_used_mb"), ago(row.get("last_used_at")), why(row)]
            for key, row in sorted(self.models.items())
        ]
        head = f"connection lost: {self.lost}" if self.lost else f"{self.server}, {time.strftime('%H:%M:%S')}"
        return [one_line(head), "", *table(["MODEL", "STATE", "MIB", "LAST USED", "WHY"], rows)]


class Screen:
    """The terminal's other screen, as long as the block runs; what was on the terminal comes back after it."""

    def __enter__(self) -> Screen:
        sys.stdout.write("\x1b[?1049h\x1b[?25l")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()

    def draw(self, lines: Sequence[str]) -> None:
        """Lines that are too long or too many are cut, or the picture would move."""
        width, height = shutil.get_terminal_size()
        shown = [line[:width] for line in lines[:height]]
        sys.stdout.write("\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in shown) + "\x1b[J")
        sys.stdout.flush()


class Loading:
    """Shows how far a model is: a bar that is drawn anew on a terminal, lines where someone reads them later."""

    def __init__(self, model: str, *, quiet: bool) -> None:
        self._model, self._quiet = model, quiet
        self._begun = time.monotonic()
        self._terminal = sys.stdout.isatty()
        self._last = ""

    def show(self, row: Row) -> None:
        if self._quiet:
            return
        reason = why(row)
        text = state(row) + (f": {one_line(reason)}" if reason else "")
        if self._terminal:
            progress = row.get("load_progress")
            known = progress if isinstance(progress, int | float) else 0.0
            line = f"{self._model}  {bar(known)}  {text}  {time.monotonic() - self._begun:.1f} s"
            sys.stdout.write(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K")
            sys.stdout.flush()
        elif (rough := _rough(row, text)) != self._last:
            self._last = rough
            print(f"{self._model}: {text}", flush=True)

    def end(self, text: str | None = None) -> None:
        """`text` stands where the bar was."""
        if self._quiet:
            return
        if self._terminal:
            sys.stdout.write("\r\x1b[K")
        if text is not None:
            print(f"{self._model}: {text}", flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun


def bar(progress: float, width: int = _BAR_WIDTH) -> str:
    done = round(max(0.0, min(1.0, progress)) * width)
    return f"[{'#' * done}{'.' * (width - done)}]"


def _rough(row: Row, text: str) -> str:
    """What two lines must differ in: ten steps of progress are enough."""
    progress = row.get("load_progress")
    if isinstance(progress, int | float) and "%" in text:
        return f"{row.get('status')} {int(progress * 10)}"
    return text


def loaded(client: Client, name: str, *, quiet: bool) -> Row:
    """Load a model and show how it goes; its last state. Raises Failed with the reason if it does not come up."""
    events = follow(client)
    herd = Herd()
    herd.take(*next(events))  # looks before it asks, so that no state is missed
    answer = client.post("/v1/models/load", {"model": name})
    model = str(answer["model"])
    first = herd.models.get(model, {}) | {"status": answer["status"]}  # what had failed is off again
    loading = Loading(model, quiet=quiet)
    row, begun = first, False
    try:
        while (verdict := ended(row, first, begun)) is None:
            begun = begun or (row is not first and row["status"] != "off")
            if begun or row.get("detail"):
                loading.show(row)
            herd.take(*next(events))
            if model not in herd.models:
                raise NotLoaded(f"{model} has been taken out of the configuration")
            row = herd.models[model]
    except BaseException:
        loading.end()
        raise
    if verdict:
        loading.end()
        raise NotLoaded(verdict if verdict.startswith(f"{model} ") else f"{model}: {verdict}")
    loading.end(f"ready in {loading.seconds:.2f} s" if row is not first else "ready already")
    return {"model": model} | row


def ended(row: Row, first: Row, begun: bool) -> str | None:
    """None while it loads, an empty text if it is ready, else why it is not; `begun`: it has been seen to load."""
    status, message = row["status"], row.get("error_message")
    if status == "ready":
        return ""
    if status in ("failed", "crashed") and (begun or row is not first):
        return str(message or f"it has {status}")
    if status != "off" or row.get("detail"):
        return None
    if message and row.get("updated_at") != first.get("updated_at"):
        return str(message)
    return "it was unloaded again" if begun else None


def watch(client: Client, wanted: Sequence[str] | None) -> None:
    """Until Ctrl-C: a line for each change."""
    herd = Herd(wanted)
    for name, data in follow(client, patient=True):
        for line in herd.take(name, data):
            print(time.strftime("%H:%M:%S"), line, flush=True)


def watch_json(client: Client, wanted: Sequence[str] | None) -> None:
    """Until Ctrl-C: each event as a line of JSON."""
    for name, data in follow(client, patient=True):
        if name != "model_update" or wanted is None or data["id"] in wanted:
            print(json.dumps({"event": name, "data": data}), flush=True)


def watch_screen(client: Client, wanted: Sequence[str] | None) -> None:
    """Until Ctrl-C: a picture that is drawn anew at each change, and then stays as it was last."""
    herd = Herd(wanted)
    events = follow(client, patient=True)
    herd.take(*next(events))  # a gateway that is not there is told on the terminal's own screen
    try:
        with Screen() as screen:
            screen.draw(herd.lines())
            for name, data in events:
                herd.take(name, data)
                screen.draw(herd.lines())
    finally:
        print("\n".join(herd.lines()))
