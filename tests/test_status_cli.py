"""`corral models` without a gateway: its words, what it makes of answers, and of servers that are none."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from gateway.cli import main
from gateway.cli.client import Client, Failed, Refused, Unreachable, one_line, segment
from gateway.cli.live import Herd, bar, ended
from gateway.cli.probe import probe, speed, wrong_with
from gateway.cli.table import ago, state, table
from tests.house import ROOT

COMMANDS = ("list", "load", "eject", "reset", "status", "test")
JSON = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"


def ran(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = main(argv)
    except SystemExit as left:
        code = int(left.code or 0)
    return (code, *capsys.readouterr())


def read_request(connection: socket.socket) -> None:
    """All of it, or closing the connection would reset it."""
    with connection.makefile("rb") as file:
        size = 0
        while line := file.readline().strip():
            name, _, value = line.partition(b":")
            size = int(value) if name.lower() == b"content-length" else size
        file.read(size)


@contextlib.contextmanager
def answering(*answers: str) -> Iterator[str]:
    """A server that gives each connection the next answer, whatever it was asked, and expects no more; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for answer in answers:
                connection, _ = server.accept()
                with connection:
                    read_request(connection)
                    connection.sendall(answer.encode())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join(5)
        assert not thread.is_alive(), "it was asked less often than expected"


# --- the command line


@pytest.mark.parametrize("command", [(), *((each,) for each in COMMANDS)])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    code, out, err = ran(capsys, "models", *command, "--help")
    assert (code, err) == (0, "")
    assert f"corral {' '.join(('models', *command))}" in out.partition("example")[2]
    assert {"--url", "--key", "--json"} <= set(out.replace(",", " ").split())


@pytest.mark.parametrize(
    ("argv", "who", "says"),
    [
        ("models", "corral models", "required: COMMAND"),
        ("models frob", "corral models", "invalid choice: 'frob'"),
        ("models load", "corral models load", "required: MODEL"),
        ("models list a", "corral models list", "unrecognized arguments: a"),
        ("models status --force", "corral models status", "unrecognized arguments: --force"),
        ("models test --timeout soon", "corral models test", "must be seconds, more than 0, not 'soon'"),
        ("models test --timeout 0", "corral models test", "must be seconds"),
        ("models test --timeout nan", "corral models test", "must be seconds"),
        ("models list --url", "corral models list", "expected one argument"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], argv: str, who: str, says: str) -> None:
    code, out, err = ran(capsys, *argv.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"{who}: ") and says in err and err.endswith(f"; see: {who} --help\n")


def test_other_commands_do_not_pay_for_it() -> None:
    program = (
        "import sys; from gateway.cli import make_parser; make_parser();"
        "print(sorted(name for name in sys.modules if name.startswith('gateway.cli.')))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "'gateway.cli.models_options'" in done.stdout
    for name in ("models", "client", "live", "probe", "table"):
        assert f"'gateway.cli.{name}'" not in done.stdout


# --- servers that are no gateway


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("localhost:8000", "http://localhost:8000"),
        ("https://gpu.example/corral/v1/", "https://gpu.example/corral"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://me:secret@host:1", "http://host:1"),
    ],
)
def test_urls(url: str, base: str) -> None:
    assert Client(url).url == base


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://x:99999", "http://x:y", "http://[::1", "http://a b", "/x"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(Failed, match="is no URL of a gateway") as failed:
        Client(url)
    assert failed.value.code == 2


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        ("", Unreachable, "the connection broke"),
        ("SSH-2.0-OpenSSH_9.2\r\n", Unreachable, "the connection broke"),
        (f"{JSON}<html>", Failed, "/x answered 200, but not as a gateway does; set --url"),
        (f"{JSON}{'[' * 100_000}", Failed, "but not as a gateway does"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", Unreachable, "the connection broke"),
        ("HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n<html>", Failed, "/x answered 502, but not as"),
        ("HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n{}", Failed, "/x answered 404, but not as"),
        ('HTTP/1.1 500 No\r\nConnection: close\r\n\r\n{"error":"x"}', Failed, "/x answered 500, but not as"),
        ("HTTP/1.1 302 Found\r\nLocation: /y\r\nConnection: close\r\n\r\n", Failed, "/x answered 302, but not as"),
    ],
)
def test_what_is_no_gateway(answer: str, kind: type[Failed], says: str) -> None:
    with answering(answer) as url, pytest.raises(Failed) as failed:
        Client(url).get("/x")
    assert type(failed.value) is kind
    assert says in str(failed.value) and "\n" not in str(failed.value)


def test_an_error_of_a_gateway() -> None:
    error = '{"error":{"message":"no \\u001b[31mway","type":"t","param":null,"code":"invalid_api_key"}}'
    answer = f"HTTP/1.1 401 Unauthorized\r\nConnection: close\r\n\r\n{error}"
    with answering(answer) as url, pytest.raises(Refused) as refused:
        Client(url).get("/x")
    assert str(refused.value) == "no [31mway; set --key or CORRAL_API_KEY"
    assert refused.value.error_code == "invalid_api_key"


@pytest.mark.parametrize(
    "bodies", [('{"data":[{"id":"x"}]}', '{"models":[]}'), ('{"data":7}', '{"models":[]}'), ("[]",), ("7",)]
)
def test_a_server_with_other_shapes(capsys: pytest.CaptureFixture[str], bodies: tuple[str, ...]) -> None:
    with answering(*(JSON + body for body in bodies)) as url:
        code, out, err = ran(capsys, "models", "list", "--url", url)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "does not answer as a gateway does" in err


def test_events() -> None:
    text = ": hello\r\n\r\nevent: a\r\ndata: {\r\ndata: }\r\n\r\ndata: 7\n\nevent: none\n\nevent: cut\ndata: 1"
    with answering(JSON + text) as url:
        assert list(Client(url).events("/x")) == [("a", {}), ("message", 7)]


def test_names_in_paths() -> None:
    assert segment("a/b c?#ü") == "a%2Fb%20c%3F%23%C3%BC"


def test_nothing_moves_the_cursor() -> None:
    assert one_line(" a\x1b[2J\r\nb\t\x07c\x9b ") == "a [2J b c"


# --- what is made of answers


def row(status: str, **more: Any) -> dict[str, Any]:
    return {"status": status, "updated_at": "1", "load_progress": None, "error_message": None} | more


FIRST = row("off", updated_at="0")


@pytest.mark.parametrize(
    ("now", "begun", "says"),
    [
        (row("ready"), False, ""),
        (row("ready"), True, ""),
        (FIRST, False, None),
        (row("off"), False, None),
        (row("off", detail="waits for b"), True, None),
        (row("starting", detail="waits for b"), True, None),
        (row("downloading"), True, None),
        (row("loading"), True, None),
        (row("stopping"), True, None),
        (row("off"), True, "it was unloaded again"),
        (row("off", error_message="a needs 9 MiB of 8"), True, "a needs 9 MiB of 8"),
        (row("off", error_message="a needs 9 MiB of 8"), False, "a needs 9 MiB of 8"),
        (row("off", updated_at="0", error_message="of the last time"), False, None),
        (row("failed", error_message="no such file"), False, "no such file"),
        (row("failed"), True, "it has failed"),
        (row("crashed", error_message="exit 1"), True, "exit 1"),
    ],
)
def test_when_a_load_has_ended(now: dict[str, Any], begun: bool, says: str | None) -> None:
    assert ended(now, FIRST, begun) == says


def test_what_failed_before_is_not_how_it_ends() -> None:
    first = row("failed", error_message="of the last time")
    assert ended(first, first, False) is None


def full(**models: dict[str, Any]) -> tuple[str, Any]:
    return "full_status", {"server": {"status": "ready"}, "models": models}


def test_the_lines_of_changes() -> None:
    herd = Herd()
    assert herd.take(*full(a=row("off"), b=row("ready"))) == ["the gateway is ready", "a is off", "b is ready"]
    assert herd.take("heartbeat", {"server_status": "ready"}) == []
    assert herd.take("model_update", {"id": "a", **row("loading", load_progress=0.5)}) == ["a is loading 50%"]
    assert herd.take("model_update", {"id": "a", **row("loading", load_progress=0.5)}) == []
    assert herd.take("model_update", {"id": "a", **row("crashed", error_message="x\ny")}) == ["a is crashed: x y"]
    assert herd.take("server_update", {"status": "draining"}) == ["the gateway is draining"]
    assert herd.take("lost", "no gateway") == ["connection lost: no gateway"]
    assert herd.take(*full(b=row("ready"))) == ["a is gone", "the gateway is ready"]


def test_only_the_models_wanted() -> None:
    herd = Herd(["b"])
    assert herd.take(*full(a=row("off"), b=row("ready"))) == ["the gateway is ready", "b is ready"]
    assert herd.take("model_update", {"id": "a", **row("loading")}) == []
    assert [line.split()[0] for line in herd.lines()[3:]] == ["b"]


@pytest.mark.parametrize(
    ("progress", "text"), [(0, "[....]"), (0.5, "[##..]"), (1, "[####]"), (7, "[####]"), (-1, "[....]")]
)
def test_bars(progress: float, text: str) -> None:
    assert bar(progress, 4) == text


def test_tables() -> None:
    lines = table(["MODEL", "RUNNING", "WHY"], [["a", 10, None], ["long name", 2, "x\ny"], ["c", None, ["p", "q"]]])
    assert lines == [
        "MODEL      RUNNING  WHY",
        "a               10  -",
        "long name        2  x y",
        "c                -  p,q",
    ]


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (None, None),
        ("soon", None),
        ("2026-01-01T12:00:00+00:00", "0 s ago"),
        ("2026-01-01T12:00:05+00:00", "0 s ago"),
        ("2026-01-01T11:58:30", "90 s ago"),
        ("2026-01-01T11:30:00+00:00", "30 min ago"),
        ("2026-01-01T07:00:00+00:00", "5 h ago"),
        ("2025-12-01T12:00:00+00:00", "31 d ago"),
    ],
)
def test_how_long_ago(at: str | None, text: str | None) -> None:
    assert ago(at, datetime(2026, 1, 1, 12, tzinfo=UTC)) == text


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (row("loading", load_progress=0.25), "loading 25%"),
        (row("downloading", load_progress=0.999), "downloading 100%"),
        (row("loading", load_progress=0), "loading"),
        (row("starting"), "starting"),
        (row("ready", load_progress=1.0), "ready"),
    ],
)
def test_states(given: dict[str, Any], text: str) -> None:
    assert state(given) == text


# --- test


CHAT = {"choices": [{}], "usage": {"completion_tokens": 8}}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (CHAT, None),
        (CHAT | {"usage": {"completion_tokens": 0}}, "it made no token"),
        ({"choices": []}, "the answer has not the shape that was asked for"),
        ({"data": [{"embedding": [0.5]}]}, None),
        ({"data": [{"embedding": []}]}, "the embedding is empty"),
        ({"data": []}, "the answer has not the shape that was asked for"),
        ({"results": [{}]}, None),
        ({"results": []}, "it ranked nothing"),
        ({}, "the answer has not the shape that was asked for"),
        ([], "the answer has not the shape that was asked for"),
        (None, "the answer has not the shape that was asked for"),
    ],
)
def test_what_is_wrong_with_an_answer(answer: Any, problem: str | None) -> None:
    assert wrong_with(answer) == problem


@pytest.mark.parametrize(
    ("answer", "tokens_per_second"),
    [
        (CHAT, 4.0),
        (CHAT | {"timings": {"predicted_per_second": 100.5}}, 100.5),
        (CHAT | {"timings": None}, 4.0),
        (CHAT | {"usage": None}, None),
        ({"data": [{"embedding": [1.0]}]}, None),
        ([], None),
    ],
)
def test_speed(answer: Any, tokens_per_second: float | None) -> None:
    assert speed(answer, 2.0) == tokens_per_second


def test_a_model_of_an_unknown_kind_is_asked_until_it_answers() -> None:
    no = 'HTTP/1.1 501 N\r\nConnection: close\r\n\r\n{"error":{"message":"it cannot","code":"not_supported"}}'
    with answering(no, JSON + '{"data":[{"embedding":[1]}]}') as url:
        assert probe(Client(url), "m", None, 5).ok
    with answering(no, no, no) as url:
        assert probe(Client(url), "m", None, 5).error == "it cannot"
    with answering(no) as url:
        assert probe(Client(url), "m", "embed", 5).error == "it cannot"
