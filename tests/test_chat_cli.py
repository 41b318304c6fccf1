"""Parts of `corral chat` that need no gateway: what events say, what a terminal is shown, commands."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gateway.cli.chat.commands import LEAVE, run_command
from gateway.cli.chat.nats import Workers
from gateway.cli.chat.screen import Screen
from gateway.cli.chat.talk import Emit, Gateway, Piece, Talk, Told, read_grammar
from gateway.cli.client import Client, Failed, Refused


class Somebody:
    """Is asked, and knows two models."""

    def answer(self, talk: Talk, emit: Emit) -> Told:
        return Told()

    def models(self) -> list[str]:
        return ["a", "b\x1b[31m"]

    def choose(self, talk: Talk, model: str) -> None:
        talk.model = model


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(out: io.StringIO, **variables: str) -> Screen:
    given: io.StringIO = Terminal() if out.isatty() else io.StringIO()
    with mock.patch("sys.stdin", given), mock.patch("sys.stdout", out):
        return Screen({"TERM": "dumb"} | variables)


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def test_what_events_say() -> None:
    events = [
        chunk(role="assistant", content=None),
        chunk(reasoning_content="hm"),
        chunk(content="Hi"),
        {"choices": []},
        "nonsense",
        chunk(content="!"),
        chunk("length") | {"timings": {"predicted_n": 3}},
    ]
    client = mock.create_autospec(Client, instance=True)
    client.answer.return_value = (event for event in events)
    pieces: list[Piece] = []
    talk = Talk(model="m", system="be brief", params={"max_tokens": 3}, turns=[{"role": "user", "content": "hi"}])
    told = Gateway(client, 5.0).answer(talk, pieces.append)
    assert pieces == [Piece("hm", "thought"), Piece("Hi"), Piece("!")]
    assert told == Told(tokens=3, finish_reason="length")
    path, body, silence = client.answer.call_args.args
    assert (path, silence) == ("/v1/chat/completions", 5.0)
    assert body == {
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "stream": True,
        "max_tokens": 3,
        "model": "m",
    }


def test_a_refusal_gets_its_mend() -> None:
    client = mock.create_autospec(Client, instance=True)
    client.answer.side_effect = Refused("too long", "context_length_exceeded")
    with pytest.raises(Refused, match="too long; in a talk, /clear begins anew"):
        Gateway(client, 5.0).answer(Talk(), print)


@pytest.mark.parametrize(
    ("tty", "variables", "shown"),
    [
        (False, {"TERM": "xterm"}, "an\x1b[31mswer"),
        (True, {"TERM": "dumb"}, "hm\nan\ufffd[31mswer"),
        (True, {"TERM": "xterm"}, "\x1b[2mhm\n\x1b[0man\ufffd[31mswer"),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, "hm\nan\ufffd[31mswer"),
        (True, {}, "hm\nan\ufffd[31mswer"),
    ],
)
def test_what_is_shown_of_an_answer(tty: bool, variables: dict[str, str], shown: str) -> None:
    """A pipe gets the model's own bytes; a terminal is not to obey what a model was made to write."""
    out = Terminal() if tty else io.StringIO()
    with mock.patch("gateway.cli.chat.screen._edit_lines"):
        place = screen(out, **variables)
    with mock.patch("sys.stdout", out):
        for piece in (Piece("hm", "thought"), Piece("an\x1b[31m"), Piece("swer")):
            place.piece(piece)
        place.end_answer()
    assert out.getvalue() == shown + "\n"


def test_other_scripts_come_through() -> None:
    out = Terminal()
    text = "می‌خواهم 👩‍👩‍👧 a\u00a0b\tc\n"
    with mock.patch("sys.stdout", out):
        screen(out).piece(Piece(text))
    assert out.getvalue() == text


def commands(talk: Talk, *lines: str) -> str:
    out = io.StringIO()
    place = screen(out)
    with mock.patch("sys.stdout", out):
        for line in lines:
            assert run_command(line, talk, Somebody(), place) is None
    return out.getvalue()


def test_commands(tmp_path: Path) -> None:
    talk = Talk(turns=[{"role": "user", "content": "hi\n"}, {"role": "assistant", "content": " yes"}])
    assert commands(talk, "/history") == "user: hi\nassistant: yes\n"
    assert commands(talk, "/system", "/system  be brief ", "/SYSTEM") == "(no system prompt)\nbe brief\nbe brief\n"
    assert commands(talk, "/model a", "/models").endswith("* a\n  b [31m\n")
    saved = tmp_path / "said.json"
    assert commands(talk, f"/save {saved}") == f"(written to {saved})\n"
    assert [turn["role"] for turn in json.loads(saved.read_text())] == ["system", "user", "assistant"]
    assert commands(talk, "/system -") == "(no system prompt)\n"
    assert commands(talk, "/clear", "/history") == "(forgotten)\n(nothing has been said)\n"
    assert "/quit" in commands(talk, "/help") and talk.turns == []


@pytest.mark.parametrize("line", ["/quit", "/exit", "/q", "/Quit "])
def test_leaving(line: str) -> None:
    assert run_command(line, Talk(), Somebody(), screen(io.StringIO())) is LEAVE


@pytest.mark.parametrize(
    ("line", "about"),
    [
        ("/", "there is no /;"),
        ("/nonsense now", "there is no /nonsense; /help"),
        ("/save", "needs a file"),
        ("/save /nowhere/x", "cannot be written: No such file"),
        ("/save ~nobody-of-that-name/x", "cannot be written"),
    ],
)
def test_commands_that_fail(line: str, about: str) -> None:
    with pytest.raises(Failed, match=about):
        run_command(line, Talk(), Somebody(), screen(io.StringIO()))


def test_grammars(tmp_path: Path) -> None:
    (tmp_path / "g").write_text('root ::= "a"')
    assert [read_grammar(given) for given in (None, "name@2", f"@{tmp_path}/g")] == [None, "name@2", 'root ::= "a"']
    (tmp_path / "binary").write_bytes(b"\xff")
    for path, about in ((tmp_path / "no", "No such file"), (tmp_path / "binary", "is not UTF-8")):
        with pytest.raises(Failed, match=about):
            read_grammar(f"@{path}")


def told_by_nats(*tokens: str, **told: Any) -> tuple[list[str], Told]:
    async def answer(*about: Any) -> dict[str, Any]:
        for token in tokens:
            about[-1](token)
        return told

    pieces: list[str] = []
    with mock.patch("gateway.workers.nats.ask.ask", answer):
        workers = Workers("nats://host", None, Talk(model="m"), 1.0)
        return pieces, workers.answer(Talk(model="m"), lambda piece: pieces.append(piece.text))


def test_answers_by_nats() -> None:
    assert told_by_nats("a", "b", text="ab", tokens_out=2) == (["a", "b"], Told(2))
    assert told_by_nats("a", text="abc", tokens_out=3) == (["a", "bc"], Told(3)), "tokens may go astray"
    with pytest.raises(Refused, match="no grammar"):
        told_by_nats(text="", error={"message": "no grammar", "code": "grammar_not_found"})
