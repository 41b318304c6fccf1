"""`corral models`: lists, loads, unloads, resets, shows and tests the models of a running gateway, over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gateway.cli import live
from gateway.cli.client import Client, Failed, Refused, segment
from gateway.cli.probe import Result, probe
from gateway.cli.table import ago, cell, state, table, why


def run(args: argparse.Namespace) -> int:
    try:
        client = make_client(args)
        try:
            return _COMMANDS[args.models_command](args, client)
        except (KeyError, TypeError) as error:  # such as a llama-server, which knows some of our routes
            raise Failed(f"{client.url} does not answer as a gateway does ({error!r}); set --url") from error
    except Failed as failed:
        _tell(failed)
        return failed.code


def make_client(args: argparse.Namespace) -> Client:
    """For the gateway of --url, CORRAL_URL, or this machine's PORT. Raises Failed, ConfigError."""
    from gateway.environment import client_variables, load_settings

    given = client_variables()
    url = getattr(args, "url", None) or given.get("CORRAL_URL")
    if not url:
        settings = load_settings()
        host = "127.0.0.1" if settings.host in ("", "0.0.0.0", "::") else settings.host
        url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    return Client(url, getattr(args, "key", None) or given.get("CORRAL_API_KEY") or None)


# The commands


def _list(args: argparse.Namespace, client: Client) -> int:
    models, files = client.get("/v1/models")["data"], client.get("/models")["models"]
    about = {row["id"]: row for row in files}
    if _as_json(args):
        _print_json([row | {"file": about.get(row["id"])} for row in models])
        return 0
    titles = ["MODEL", "STATE", "SLOTS", "CONTEXT", "QUANT", "FAMILY", "ALIASES", "FILE"]
    rows = []
    for row in models:
        meta, file = row["meta"], about.get(row["id"], {})
        facts = [file.get("quant"), file.get("family"), meta.get("aliases"), file.get("path")]
        rows.append([row["id"], row["status"], meta.get("slots"), meta.get("n_ctx"), *facts])
    print("\n".join(table(titles, rows)))
    return 0


def _load(args: argparse.Namespace, client: Client) -> int:
    def load(name: str) -> dict[str, Any]:
        if not args.no_wait:
            return live.loaded(client, name, quiet=_as_json(args))
        answer: dict[str, Any] = client.post("/v1/models/load", {"model": name})
        if not _as_json(args):
            print(f"{answer['model']}: {answer['status']}, and asked for; see: corral models status --watch")
        return answer

    return _each(args, load)


def _eject(args: argparse.Namespace, client: Client) -> int:
    def eject(name: str) -> dict[str, Any]:
        body = {"model": name} | ({"force": True} if args.force else {})
        answer: dict[str, Any] = client.post("/v1/models/eject", body, timeout=None)
        if not _as_json(args):
            print(f"{answer['model']}: {answer['status']}")
        return answer

    return _each(args, eject)


def _reset(args: argparse.Namespace, client: Client) -> int:
    def reset(name: str) -> dict[str, Any]:
        answer: dict[str, Any] = client.post(f"/v1/models/{segment(name)}/reset", {})
        if not _as_json(args):
            print(f"{answer['model']}: {answer['status']}")
        return answer

    return _each(args, reset)


def _status(args: argparse.Namespace, client: Client) -> int:
    wanted = _ids(client, args.models) if args.models else None
    if args.watch:
        show = live.watch_json if _as_json(args) else live.watch_screen if sys.stdout.isatty() else live.watch
        with contextlib.suppress(KeyboardInterrupt):
            show(client, wanted)
        return 0
    status = client.get("/v1/models/status")
    if wanted is not None:
        status["models"] = {name: row for name, row in status["models"].items() if name in wanted}
    if _as_json(args):
        _print_json(status)
        return 0
    places = {row["model_id"]: row for row in client.get("/status")["instances"]}
    details = {row["id"]: row.get("detail") for row in client.get("/vram")["models"]}
    rows = []
    for name, row in sorted(status["models"].items()):
        place = places.get(name, {})
        memory = row["vram_used_mb"] if row["vram_used_mb"] is not None else place.get("est_vram_mb")
        reason = why({"detail": details.get(name)} | {"error_message": row["error_message"]})
        counts = [place.get("inflight"), place.get("queue_len"), memory]
        rows.append([name, state(row), *counts, ago(row["last_used_at"]), reason])
    print(f"{client.url} is {cell(status['server']['status'])}, up since {cell(status['server']['started_at'])}\n")
    print("\n".join(table(["MODEL", "STATE", "RUNNING", "WAITING", "MIB", "LAST USED", "WHY"], rows)))
    return 0


def _test(args: argparse.Namespace, client: Client) -> int:
    tasks = {row["id"]: row["meta"].get("task") for row in client.get("/v1/models")["data"]}
    names = _ids(client, args.models) if args.models else list(tasks)
    if not names:
        raise Failed("there is no model that this key may use; see: corral models list")
    results = []
    for name in names:
        if sys.stderr.isatty():
            sys.stderr.write(f"\rtesting {name} …\x1b[K")
            sys.stderr.flush()
        results.append(probe(client, name, tasks.get(name), args.timeout))
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
    if _as_json(args):
        _print_json([result.as_json() for result in results])
    else:
        print("\n".join(_results(results)))
    return 0 if all(result.ok for result in results) else 1


_COMMANDS: dict[str, Callable[[argparse.Namespace, Client], int]] = {
    "list": _list,
    "load": _load,
    "eject": _eject,
    "reset": _reset,
    "status": _status,
    "test": _test,
}

# What they share


def _each(args: argparse.Namespace, act: Callable[[str], dict[str, Any]]) -> int:
    """One model after the other: what is wrong with one does not keep the others back."""
    answers, failures = [], 0
    for name in args.models:
        try:
            answers.append(act(name))
        except Refused as refused:
            failures += 1
            answers.append({"model": name, "error": str(refused), "code": refused.error_code})
            _tell(refused)
        except live.NotLoaded as failed:
            failures += 1
            answers.append({"model": name, "error": str(failed)})
            _tell(failed)
    if _as_json(args):
        _print_json(answers)
    return 1 if failures else 0


def _ids(client: Client, names: Sequence[str]) -> list[str]:
    """The ids behind ids and aliases. Raises Refused for one that does not exist."""
    return [str(client.get(f"/v1/models/{segment(name)}/status")["alias"]) for name in names]


def _results(results: Sequence[Result]) -> list[str]:
    rows = [[each.model, each.ok, each.seconds, each.tokens_per_second, each.error] for each in results]
    return table(["MODEL", "OK", "SECONDS", "TOKENS/S", "ERROR"], rows)


def _as_json(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "json", False))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _tell(failed: Failed) -> None:
    print(f"corral models: {failed}", file=sys.stderr)
