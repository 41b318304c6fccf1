"""Telemetry derived again from the file: each number by a question of its own, in the words of its definition."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

STATS = {"response_time_stats": "duration_ms", "queue_ms": "queue_ms", "load_ms": "load_ms", "ttft_ms": "ttft_ms"}
COUNTS = {
    "total_requests": "TRUE",
    "successful": "status < 400",
    "failed": "status >= 400",
    "rejected": "status >= 400 AND status < 499",
    "cancelled": "status = 499",
}
GENERATED = "tokens_out > 0 AND ttft_ms IS NOT NULL"


class File:
    def __init__(self, path: Path, where: str = "TRUE") -> None:
        self._path, self.where = path, where

    def one(self, sql: str, *values: object) -> Any:
        with contextlib.closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as connection:
            return connection.execute(sql, values).fetchone()[0]

    def column(self, sql: str) -> list[Any]:
        with contextlib.closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as connection:
            return [row[0] for row in connection.execute(sql)]

    def all(self, sql: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as connection:
            return connection.execute(sql).fetchall()


def check_summary(path: Path, told: Mapping[str, Any], where: str = "TRUE") -> None:
    check_numbers(File(path, where), told)
    for title, column in (("per_model", "model"), ("per_key", "key_id")):
        groups = File(path).column(f"SELECT DISTINCT {column} FROM requests WHERE {where}")
        assert sorted(told[title]) == sorted(groups)
        for group, numbers in told[title].items():
            check_numbers(File(path, f"{where} AND {column} = '{group}'"), numbers)


def check_numbers(file: File, told: Mapping[str, Any]) -> None:
    for name, condition in COUNTS.items():
        assert told[name] == file.one(f"SELECT count(*) FROM requests WHERE {file.where} AND {condition}"), name
    total = told["total_requests"]
    assert told["success_rate"] == (pytest.approx(told["successful"] / total) if total else None)
    for name in ("tokens_in", "tokens_out", "tokens_cached"):
        assert told[name] == sum(file.column(f"SELECT {name} FROM requests WHERE {file.where}")), name
    for name, column in STATS.items():
        check_stats(file, told[name], column)
    times = file.all(f"SELECT duration_ms, queue_ms, load_ms FROM requests WHERE {file.where} AND {GENERATED}")
    seconds = sum(max(0.0, whole - queue - load) for whole, queue, load in times) / 1000
    tokens = file.one(f"SELECT sum(tokens_out) FROM requests WHERE {file.where} AND {GENERATED}")
    assert told["tokens_per_second"] == (pytest.approx(tokens / seconds) if seconds else None)


def check_stats(file: File, told: Mapping[str, Any], column: str) -> None:
    values = f"(SELECT {column} AS v FROM requests WHERE {file.where} AND {column} IS NOT NULL)"
    n = file.one(f"SELECT count(*) FROM {values}")
    assert told["min"] == file.one(f"SELECT v FROM {values} ORDER BY v LIMIT 1") if n else told["min"] is None
    assert told["max"] == file.one(f"SELECT v FROM {values} ORDER BY v DESC LIMIT 1") if n else told["max"] is None
    assert told["avg"] == (pytest.approx(file.one(f"SELECT total(v) FROM {values}") / n) if n else None)
    for percent in (50, 95, 99):  # the smallest value that so many percent of all do not exceed
        wanted = file.one(
            f"SELECT min(v) FROM {values} AS a WHERE 100 * (SELECT count(*) FROM {values} AS b WHERE b.v <= a.v) "
            f">= {percent * n}"
        )
        assert told[f"p{percent}"] == wanted, (column, percent)


def check_errors(path: Path, told: Mapping[str, Any], where: str = "TRUE") -> None:
    file = File(path, where)
    failed = file.one(f"SELECT count(*) FROM requests WHERE {where} AND status >= 400")
    assert told["total_errors"] == failed
    columns = {"code": "error", "status": "status", "model": "model", "key": "key_id"}
    for title in ("errors", "per_code", "per_model", "per_key"):
        assert sum(row["count"] for row in told[title]) == failed, title
        for row in told[title]:
            same = " AND ".join(
                f"{column} IS NULL" if row[name] is None else f"{column} = '{row[name]}'"
                for name, column in columns.items()
                if name in row
            )
            these = f"requests WHERE {where} AND status >= 400 AND {same}"
            assert row["count"] == file.one(f"SELECT count(*) FROM {these}")
            assert row["last_seen"] == file.one(f"SELECT ts FROM {these} ORDER BY ts DESC LIMIT 1")
            assert row["request_id"] in file.column(f"SELECT request_id FROM {these} AND ts = {row['last_seen']!r}")


def check_requests(path: Path, told: Mapping[str, Any]) -> None:
    file, bucket = File(path), told["bucket_seconds"]
    inside = f"ts >= {told['since']!r} AND ts < {told['until']!r}"
    starts = [row["ts"] for row in told["buckets"]]
    if told["since"] == told["until"]:
        assert (starts, told["per_route"], told["per_status"]) == ([], [], [])
        return
    assert starts == list(range(starts[0], starts[0] + bucket * len(starts), bucket))
    assert starts[0] <= told["since"] < starts[0] + bucket and starts[-1] < told["until"] <= starts[-1] + bucket
    for row in told["buckets"]:
        these = f"requests WHERE {inside} AND ts >= {row['ts']} AND ts < {row['ts'] + bucket}"
        for name in ("total_requests", "successful", "failed"):
            assert row[name] == file.one(f"SELECT count(*) FROM {these} AND {COUNTS[name]}")
        for name in ("tokens_in", "tokens_out", "tokens_cached"):
            assert row[name] == file.one(f"SELECT total({name}) FROM {these}")
        durations = file.column(f"SELECT duration_ms FROM {these}")
        assert row["max_ms"] == (max(durations) if durations else None)
        assert row["avg_ms"] == (pytest.approx(sum(durations) / len(durations)) if durations else None)
    whole = file.one(f"SELECT count(*) FROM requests WHERE {inside}")
    assert sum(row["total_requests"] for row in told["buckets"]) == whole
    assert sum(row["count"] for row in told["per_status"]) == whole
    for row in told["per_status"]:
        assert row["count"] == file.one(f"SELECT count(*) FROM requests WHERE {inside} AND status = ?", row["status"])
    assert sum(row["total_requests"] for row in told["per_route"]) == whole
    for row in told["per_route"]:
        for name in ("total_requests", "successful", "failed"):
            sql = f"SELECT count(*) FROM requests WHERE {inside} AND route = ? AND {COUNTS[name]}"
            assert row[name] == file.one(sql, row["route"])
