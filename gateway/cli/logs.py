"""`corral logs`: prints and exports the records of requests of a running gateway, over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from gateway.cli.client import Client, Failed, Unreachable, one_line
from gateway.cli.models import make_client

DEFAULT_LIMIT = 50
PAGE = 500
FOLLOW_SECONDS = 1.0

Row = dict[str, Any]


def run(args: argparse.Namespace) -> int:
    try:
        client = make_client(args)
        try:
            with contextlib.suppress(KeyboardInterrupt) if args.follow else contextlib.nullcontext():
                _print_all(args, client)
        except (KeyError, TypeError) as error:
            raise Failed(f"{client.url} does not answer as a gateway does ({error!r}); set --url") from error
    except Failed as failed:
        print(f"corral logs: {failed}", file=sys.stderr)
        return failed.code
    return 0


def _print_all(args: argparse.Namespace, client: Client) -> None:
    filters = {"key": args.key_id, "model": args.model, "status": args.status}
    filters = {name: value for name, value in filters.items() if value}
    since = {"since": args.since} if args.since else {}
    last = _newest(client) if args.follow else 0
    limit = args.limit or (None if args.since else DEFAULT_LIMIT)
    rows = _forward(client, filters | since, 0) if limit is None else _latest(client, filters | since, limit)
    show = _as_json if getattr(args, "json", False) else line
    for row in rows:
        print(show(row))
        last = max(last, row["id"])
    lost = False
    while args.follow:
        sys.stdout.flush()
        time.sleep(FOLLOW_SECONDS)
        try:
            if lost:
                newest = _newest(client)
                last = 0 if newest < last else last  # the gateway has begun new books
            lost = False
            for row in _forward(client, filters, last):
                print(show(row))
                last = row["id"]
        except Unreachable as error:
            if not lost:
                print(f"corral logs: {error}; trying again", file=sys.stderr)
            lost = True


def _newest(client: Client) -> int:
    rows = _page(client, {"limit": 1})["logs"]
    return int(rows[0]["id"]) if rows else 0


def _forward(client: Client, filters: dict[str, Any], after: int) -> Iterator[Row]:
    """All behind `after`, oldest first, page by page: what is exported need not fit into memory."""
    where: int | None = after
    while where is not None:
        page = _page(client, filters | {"after": where, "limit": PAGE})
        yield from page["logs"]
        where = page["next"]


def _latest(client: Client, filters: dict[str, Any], limit: int) -> list[Row]:
    """The newest, oldest of them first."""
    rows: list[Row] = []
    where: int | None = None
    while len(rows) < limit:
        page = _page(client, filters | {"limit": min(PAGE, limit - len(rows))} | ({"before": where} if where else {}))
        rows += page["logs"]
        where = page["next"]
        if where is None:
            break
    return rows[::-1]


def _page(client: Client, query: dict[str, Any]) -> dict[str, Any]:
    page: dict[str, Any] = client.get(f"/logs?{urlencode(query)}")
    return page


def line(row: Row) -> str:
    """A record as one line for people; the same fields stand at the same place in each."""
    at = datetime.fromtimestamp(row["ts"], UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    times = [f"{_ms(row['duration_ms'])} ms", f"queue {_ms(row['queue_ms'])}", f"load {_ms(row['load_ms'])}"]
    times.append(f"first token {_ms(row['ttft_ms'])}")
    tokens = f"tokens {row['tokens_in']}+{row['tokens_out']}"
    words = [at, row["status"], row["key_id"] or "-", row["model"] or "-", row["route"], ", ".join([*times, tokens])]
    return one_line(" ".join(map(str, [*words, row["request_id"], row["error"] or ""])))


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _as_json(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False)
