"""`corral keys`: makes, lists, rotates, removes and checks keys in the keys file, which a running gateway follows."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gateway.cli import keys_options, output
from gateway.stores.keys import hashes
from gateway.stores.keys import io as keyio
from gateway.stores.keys.file import (
    Key,
    KeyFile,
    Line,
    compose,
    format_time,
    parse_time,
    with_expiry,
    with_secret,
)

RESERVED = {"env": "keys of API_KEY", "anonymous": "everyone while AUTH_ENABLED is false"}
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class _Failed(Exception):
    """Ends the command with a line on stderr and an exit code: 1 failed, 2 used wrongly."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], default_file: Callable[[], Path]
) -> argparse.ArgumentParser:
    """`default_file` is asked only if the line names no file."""
    parser = keys_options.add_parser(subparsers)
    parser.set_defaults(run=run, default_keys_file=default_file)
    return parser


def run(args: argparse.Namespace, now: Callable[[], float] = time.time) -> int:
    path: Path = getattr(args, "file", None) or args.default_keys_file()
    try:
        return _COMMANDS[args.keys_command](args, path, now())
    except _Failed as failed:
        message, code = str(failed), failed.code
    except (BrokenPipeError, output.Unwritten):
        raise  # that is stdout, not the file
    except OSError as error:
        message, code = f"{path}: {error.strerror or error}; {_mend(error)}", 1
    print(f"corral keys: {message}", file=sys.stderr)
    return code


# The commands


def _generate(args: argparse.Namespace, path: Path, now: float) -> int:
    name: str = args.name
    if name in RESERVED:
        raise _Failed(f"'{name}' is the id of {RESERVED[name]}; choose another name", 2)
    expires = _expiry(args.expires, now)
    attributes = {name: value for name in keys_options.ATTRIBUTES if (value := getattr(args, name)) is not None}
    secret, stored = _new_secret(args, name)
    text = _composed(lambda: compose(name, stored, args.rate_limit, expires, attributes))
    with keyio.edit(path, create=True) as keys:
        if keys.of(name):
            raise _Failed(f"there is a key '{name}' already; use: corral keys rotate --name {name}")
        _refuse_known_secret(args, keys, secret)
        keys.insert(text)
        made = keys.lines[-1]
    assert made.key is not None
    _show_secret(args, path, made, secret, {})
    _hint(args, f"key '{name}' is in {path} ({_stored_as(made)}). This is the only time that it is shown.")
    _hint(args, "send it as Authorization: Bearer KEY, or x-api-key: KEY; a running gateway knows it within 2 seconds")
    _hint_permissions(args, path)
    return 0


def _list(args: argparse.Namespace, path: Path, now: float) -> int:
    keys = _load(args, path)
    records = [_record(line.key, keys.state(line, now), line) for line in keys.lines if line.key]
    problems = [f"line {line.number}: {line.problem}" for line in keys.lines if line.problem]
    if _flag(args, "json"):
        output.write(json.dumps({"file": str(path), "keys": records, "problems": problems}, indent=2))
    elif records:
        _print_table(records)
    for problem in problems:
        print(f"corral keys: {path} {problem}", file=sys.stderr)
    return 0


def _rotate(args: argparse.Namespace, path: Path, now: float) -> int:
    name: str = args.name
    grace = _duration(args.grace)
    if grace is None:
        raise _Failed(f"--grace must be a time such as 24h, 30m or 0, not '{args.grace}'", 2)
    secret, stored = _new_secret(args, name)
    ends = math.ceil(now + grace) if grace else now
    with keyio.edit(path) as keys:
        lines = _existing(keys, name, path)
        _refuse_known_secret(args, keys, secret)
        bad = next((line for line in lines if line.problem), None)
        if bad:
            raise _Failed(f"{path} line {bad.number}: {bad.problem}; mend or delete it, then rotate")
        current = lines[-1]
        assert current.key is not None
        expires = _expiry(args.expires, now) if args.expires else current.key.expires
        if expires is not None and expires <= now:
            raise _Failed(f"'{name}' expired on {format_time(expires)}, and so would the new key; add --expires 30d")
        keys.insert(_composed(lambda: with_secret(current, stored, expires)), after=current)
        made = keys.lines[keys.lines.index(current) + 1]
        old = [_end(keys, line, ends, now) for line in lines][-1]
    until = format_time(old) if old else None
    _show_secret(args, path, made, secret, {"grace_ends": until})
    rest = f"The old key works until {until}." if until else "The old key has stopped working."
    _hint(args, f"key '{name}' has a new secret in {path} ({_stored_as(made)}), shown only now. {rest}")
    _hint_permissions(args, path)
    return 0


def _end(keys: KeyFile, line: Line, ends: float, now: float) -> float | None:
    """Lets an old line expire at `ends`, if not before; returns when, or None if that is now."""
    assert line.key is not None
    if line.key.expired(now) or ends <= now:
        keys.remove(line)  # of no use to anyone, and a rotation a day would fill the file
        return None
    if line.key.expires is not None and line.key.expires <= ends:
        return line.key.expires
    keys.replace(line, with_expiry(line, ends))
    return ends


def _remove(args: argparse.Namespace, path: Path, now: float) -> int:
    name: str = args.name
    with keyio.edit(path) as keys:
        lines = _existing(keys, name, path)
        for line in lines:
            keys.remove(line)
    if _flag(args, "json"):
        output.write(json.dumps({"id": name, "removed": len(lines), "file": str(path)}))
    else:
        _hint(args, f"removed '{name}' from {path}; a running gateway refuses it within 2 seconds")
    return 0


def _check(args: argparse.Namespace, path: Path, now: float) -> int:
    secret = _line_of_stdin() if args.key == "-" else args.key.strip()
    if not secret:
        raise _Failed("no key given; write it on the line, or pipe it in with: corral keys check -", 2)
    keys = _load(args, path)
    line = next((line for line in keys.lines if line.key and hashes.matches(line.stored, secret)), None)
    if line is None or line.key is None:
        verdict, record, text = "unknown", {}, f"unknown: no key in {path} has this secret"
    else:
        state = keys.state(line, now)
        record = _record(line.key, state, line)
        verdict = "expired" if state == "expired" else "valid"
        end = f", expires {record['expires']}" if line.key.expires is not None else ""
        end = end.replace("expires", "expired on") if verdict == "expired" else end
        text = f"{verdict}: {line.key.id} (scope {','.join(record['scopes'])}{end})"
    output.write(json.dumps({"result": verdict} | record) if _flag(args, "json") else text)
    return 0 if verdict == "valid" else 1


_COMMANDS: dict[str, Callable[[argparse.Namespace, Path, float], int]] = {
    "generate": _generate,
    "list": _list,
    "rotate": _rotate,
    "remove": _remove,
    "check": _check,
}

# What they share


def _flag(args: argparse.Namespace, name: str) -> bool:
    return bool(getattr(args, name, False))


def _hint(args: argparse.Namespace, text: str) -> None:
    if not _flag(args, "quiet"):
        print(text, file=sys.stderr)


def _hint_permissions(args: argparse.Namespace, path: Path) -> None:
    if path.stat().st_mode & 0o007:
        _hint(args, f"{path} can be read by every user of this machine; if the gateway does not need that: chmod 600")


def _line_of_stdin() -> str:
    """What `-` stands for."""
    if sys.stdin is None:
        raise _Failed("stdin is closed, from which - reads; pipe the key in, or give a file: < key.txt")
    try:
        return sys.stdin.readline().strip()
    except OSError as error:
        raise _Failed(f"stdin cannot be read ({error.strerror or error}); give a file: < key.txt") from None
    except UnicodeDecodeError:
        raise _Failed("what came on stdin is not UTF-8", 2) from None


def _load(args: argparse.Namespace, path: Path) -> KeyFile:
    try:
        return KeyFile(keyio.read(path, wait=10.0)[0])
    except FileNotFoundError:
        _hint(args, f"there is no keys file {path} yet; make a key with: corral keys generate --name ID")
        return KeyFile()


def _existing(keys: KeyFile, name: str, path: Path) -> list[Line]:
    lines = keys.of(name)
    if not lines:
        near = difflib.get_close_matches(name, keys.ids, n=1)
        raise _Failed(
            f"no key '{name}' in {path}; " + (f"did you mean '{near[0]}'?" if near else "see: corral keys list")
        )
    return lines


def _new_secret(args: argparse.Namespace, name: str) -> tuple[str, str]:
    """The secret and what is stored of it."""
    if args.secret is None:
        secret = f"sk-{name}-{secrets.token_urlsafe(32)}"
        return secret, secret if args.plaintext else hashes.fast_hash(secret)
    secret = _line_of_stdin() if args.secret == "-" else args.secret
    problem = hashes.problem(secret)
    if problem or "$" in secret:
        raise _Failed(f"--secret: {problem or 'give the secret itself, not a hash'}", 2)
    return secret, secret if args.plaintext else hashes.slow_hash(secret)


def _refuse_known_secret(args: argparse.Namespace, keys: KeyFile, secret: str) -> None:
    if args.secret is None:
        return  # 256 random bits
    for line in keys.lines:
        if line.key and hashes.matches(line.stored, secret):
            raise _Failed(f"--secret: this secret is that of key '{line.key.id}' (line {line.number}); choose another")


def _composed(make: Callable[[], str]) -> str:
    try:
        return make()
    except ValueError as error:
        raise _Failed(str(error), 2) from error


def _duration(text: str) -> int | None:
    """Seconds of `30d`, `24h`, `60m`; None if it is no such thing."""
    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", text)
    if match:
        return int(match[1]) * _UNITS[match[2]]
    return 0 if text == "0" else None


def _expiry(text: str | None, now: float) -> float | None:
    if text is None:
        return None
    duration = _duration(text)
    try:
        moment = parse_time(text) if duration is None else float(math.ceil(now + duration))
        format_time(moment)
    except (ValueError, OverflowError):
        raise _Failed(
            f"--expires must be 30d, 24h, 60m or a time such as 2027-01-31T12:00:00Z, not '{text}'", 2
        ) from None
    if moment <= now or duration == 0:
        raise _Failed(f"--expires: '{text}' has passed already", 2)
    return moment


def _stored_as(line: Line) -> str:
    return f"stored as {hashes.form(line.stored)}"


def _record(key: Key, state: str, line: Line) -> dict[str, Any]:
    return {
        "id": key.id,
        "state": state,
        "scopes": sorted(key.scopes),
        "models": list(key.models),
        "requests_per_minute": key.rpm,
        "tokens_per_minute": key.tpm,
        "tokens_per_day": key.budget,
        "concurrency": key.concurrency,
        "priority": key.priority,
        "expires": None if key.expires is None else format_time(key.expires),
        "stored": hashes.form(line.stored),
        "line": line.number,
    }


def _show_secret(args: argparse.Namespace, path: Path, line: Line, secret: str, more: dict[str, Any]) -> None:
    assert line.key is not None
    text = secret
    if _flag(args, "json"):
        record = _record(line.key, "active", line)
        del record["line"]
        text = json.dumps({"id": line.key.id, "key": secret, "file": str(path)} | more | record, indent=2)
    try:
        output.write(text)
    except OSError as error:
        output.drop_stdout()
        raise _Failed(
            f"key '{line.key.id}' is in {path}, but could not be shown ({output.why(error)}), and never will be; "
            f"make another secret for it: corral keys rotate --name {line.key.id}"
        ) from None


def _print_table(records: Sequence[dict[str, Any]]) -> None:
    def cell(value: Any) -> str:
        return "-" if value is None else ",".join(value) if isinstance(value, list) else str(value)

    columns = {
        "ID": "id",
        "STATE": "state",
        "SCOPE": "scopes",
        "MODELS": "models",
        "RPM": "requests_per_minute",
        "TPM": "tokens_per_minute",
        "TOKENS/DAY": "tokens_per_day",
        "PARALLEL": "concurrency",
        "PRIORITY": "priority",
        "EXPIRES": "expires",
        "STORED": "stored",
    }
    rows = [list(columns), *([cell(record[name]) for name in columns.values()] for record in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        output.write("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _mend(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "make a key with: corral keys generate --name ID, or name the file with --file"
    if isinstance(error, keyio.KeyFileBusy):
        return "try again, or find out who holds it with: fuser FILE"
    if isinstance(error, IsADirectoryError):
        return "remove it, or name a file with --file"
    return "run this as the file's owner, or name another file with --file"
