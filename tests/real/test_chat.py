"""`corral chat` before a gateway with a real llama-server: in scripts, and at a real pseudo-terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gateway.cli import main
from tests.house import ADMIN, FAKE_LLAMA, ROOT, USER, Gateway, eventually, free_port, running_gateway
from tests.terminal import CTRL_C, CTRL_D, Terminal, terminal

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]


@pytest.fixture(scope="module")
def herd(
    tmp_path_factory: pytest.TempPathFactory, chat_model: Path, slow_model: Path, embedding_model: Path
) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("chat")
    models = {
        "tiny": {"model_path": str(chat_model), "aliases": ["small"], "slots": 2},
        "slow": {"model_path": str(slow_model), "slots": 1},
    }
    config = {"models": models, "system": {"default_model": "tiny", "preload_models": ["*"]}}
    (folder / "config.json").write_text(json.dumps(config))
    with running_gateway(folder, CONFIG_PATH=str(folder / "config.json")) as gateway:
        yield gateway


@dataclass
class Done:
    code: int
    out: str
    err: str


def around(gateway: Gateway) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "HOME": str(gateway.folder), "CORRAL_URL": gateway.url, "CORRAL_API_KEY": USER}


def chat(gateway: Gateway, *argv: str, given: str = "") -> Done:
    """In a script, with no terminal at any end; in this process, as one of its own costs most of a second."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, around(gateway) | {"TERM": "xterm"}, clear=True),
        mock.patch.object(sys, "stdin", io.StringIO(given)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = main(["chat", *argv])
        except SystemExit as end:  # argparse's
            code = int(str(end.code))
    return Done(code, out.getvalue(), err.getvalue())


def chat_process(gateway: Gateway, *argv: str, given: bytes = b"") -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "chat", *argv],
        cwd=gateway.folder,
        env=around(gateway) | {"PATH": os.environ["PATH"], "TERM": "xterm"},
        input=given,
        capture_output=True,
        timeout=20,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def last_request(gateway: Gateway) -> dict[str, Any]:
    """What the gateway wrote down of it."""
    rows = gateway.get("/logs?limit=1", key=ADMIN).json()["logs"]
    return dict(rows[0]) if rows else {}  # they are written down within a second


# --- in a script


def test_one_shot(herd: Gateway) -> None:
    done = chat_process(herd, "--input", "hi", "--max-tokens", "5", "--temperature", "0")
    assert (done.code, done.err) == (0, "")
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}
    expected = herd.request("POST", "/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert done.out == expected + "\n" and "\x1b" not in done.out


def test_what_comes_by_a_pipe_is_the_input(herd: Gateway) -> None:
    piped = chat_process(herd, "--max-tokens", "5", "--temperature", "0", given=b"hi")
    dashed = chat(herd, "--input", "-", "--max-tokens", "5", "--temperature", "0", given="hi")
    assert piped.code == dashed.code == 0
    assert piped.out == dashed.out != "\n"


def test_options_reach_the_model(herd: Gateway, tmp_path: Path) -> None:
    grammar = 'root ::= "yes" | "no"'
    (tmp_path / "g.gbnf").write_text(grammar)
    assert chat(herd, "--input", "hi", "--grammar", grammar).out.strip() in ("yes", "no")
    assert chat(herd, "--input", "hi", "--grammar", f"@{tmp_path / 'g.gbnf'}").out.strip() in ("yes", "no")
    assert chat(herd, "--input", "hi", "--max-tokens", "3", "--model", "small").code == 0
    plain = eventually(lambda: (row := last_request(herd)).get("tokens_out") == 3 and row)
    assert chat(herd, "--input", "hi", "--max-tokens", "4", "--system", "be brief").code == 0
    systemic = eventually(lambda: (row := last_request(herd)).get("tokens_out") == 4 and row)
    assert plain["model"] == "tiny" and int(systemic["tokens_in"]) > int(plain["tokens_in"])


def test_a_talk_by_a_pipe_has_a_history(herd: Gateway) -> None:
    lines = "one\n\n/history\n/system be brief\ntwo \\\nlines\n/model small\n/history\n"
    done = chat(herd, "-i", "--max-tokens", "3", "--temperature", "0", given=lines)
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out and "> " not in done.out
    first = done.out.splitlines()[0]
    assert f"user: one\nassistant: {first.strip()}\n" in done.out
    assert done.out.rindex("user: two \nlines\n") > done.out.index("be brief")


@pytest.mark.parametrize(
    ("argv", "code", "about"),
    [
        (["--input", "hi", "--model", "nobody"], 1, "the model 'nobody' does not exist; there are: slow, tiny; see: "),
        (["--input", "hi", "--grammar", "root ::= ("], 1, "grammar"),
        (["--input", "word " * 9000], 1, "/clear begins anew"),
        (["--input", "hi", "--key", "sk-nobody-0123456789abcdef"], 1, "set --key or CORRAL_API_KEY"),
        (["--input", "hi", "--url", "http://127.0.0.1:9"], 1, "no gateway at http://127.0.0.1:9: is it running?"),
        (["--input", "hi", "--url", "ftp://x"], 2, "is no URL of a gateway"),
        (["--input", "  "], 2, "the input is empty"),
        ([], 2, "the input is empty"),
        (["--input", "-", "-i"], 2, "--input - takes all of stdin"),
        (["--input", "hi", "--max-tokens", "0"], 2, "must be a number of tokens, at least 1"),
        (["--input", "hi", "--temperature", "hot"], 2, "must be a number, at least 0"),
        (["--input", "hi", "--grammar", "@/nowhere"], 2, "No such file"),
        (["--input", "hi", "--subject", "x"], 2, "--subject is for NATS"),
        (["--input", "hi", "--nats", "nats://127.0.0.1:9"], 2, "give --model ID, or --subject"),
        (["--input", "hi", "--nats", "nats://127.0.0.1:9", "--model", "a"], 1, "see --nats and --subject"),
        (["--input", "hi", "--nats", "nope://x", "--model", "a"], 2, "--nats: must be nats://host:4222"),
        (["--input", "hi", "--nats", "nats://x", "--subject", "a b"], 2, "is no subject of a job"),
    ],
)
def test_mistakes_are_one_line_with_the_mend(herd: Gateway, argv: list[str], code: int, about: str) -> None:
    done = chat(herd, *argv)
    assert done.code == code, done.err
    assert done.out == "" and len(done.err.splitlines()) == 1
    assert done.err.startswith("corral chat: ") and about in done.err, done.err


def test_a_mistake_in_a_piped_talk_is_told_and_the_talk_goes_on(herd: Gateway) -> None:
    done = chat(herd, "-i", "--max-tokens", "3", given="/nothing\n/model nobody\nhi\n")
    assert done.code == 1 and done.out.strip()
    first, second = done.err.splitlines()
    assert first == "corral chat: there is no /nothing; /help tells the commands"
    assert second == "corral chat: there is no model 'nobody'; there are: tiny, slow"


def test_an_answer_that_breaks_off(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), LLAMA_SERVER_PATH=str(FAKE_LLAMA)) as gateway:
        for command in ("error=2", "die=2"):
            done = chat(gateway, "--input", f"{{{{fake: {command}}}}}")
            assert done.code == 1 and done.out.endswith("\n") and done.out.strip(), done
            assert done.err.startswith("corral chat: ") and done.err.count("\n") == 1


# --- at a terminal


def at_terminal(gateway: Gateway, *argv: str, **variables: str) -> contextlib.AbstractContextManager[Terminal]:
    about = {name: value for name, value in around(gateway).items() if name.startswith("CORRAL")}
    return terminal(gateway.folder, "chat", *argv, **about, **variables)


def test_a_talk(herd: Gateway) -> None:
    with at_terminal(herd, "--max-tokens", "4") as person:
        person.expect("/help tells the commands")
        person.expect("> ")
        person.line("hello")
        answer = person.expect("(4 tokens, ")
        assert "\x1b[2m" in answer, "our own words are dimmed"
        person.expect("> ")
        person.line("/model")
        person.expect("  tiny\n")
        person.expect("  slow\n")
        person.line("/model slow")
        person.expect("(the next answers are of slow")
        person.line("and you?")
        person.expect("(4 tokens, ")
        eventually(lambda: last_request(herd).get("model") == "slow")
        person.line("/history")
        person.expect("user: hello\nassistant: ")
        person.expect("user: and you?\nassistant: ")
        person.line("/save said.json")
        person.expect("(written to said.json)")
        roles = [turn["role"] for turn in json.loads((herd.folder / "said.json").read_text())]
        assert roles == ["user", "assistant"] * 2
        person.line("/clear")
        person.expect("(forgotten)")
        person.line("/history")
        person.expect("(nothing has been said)")
        person.line("/system be brief")
        person.expect("be brief\n> ")
        person.line("/help")
        person.expect("/quit")
        person.line("//slash")
        person.expect("(4 tokens, ")
        person.line("/quit")
        assert person.ends() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(herd: Gateway) -> None:
    with at_terminal(herd, "-i", "--model", "slow", "--max-tokens", "3000") as person:
        person.expect("> ")
        person.line("a long one")
        person.expect("a long one\n")
        person.expect(" ")
        person.type(CTRL_C)
        person.expect("(stopped)")
        eventually(lambda: busy(herd) == 0, 5)
        eventually(lambda: last_request(herd).get("status") == 499)
        person.line("/history")
        person.expect("user: a long one\nassistant: ")
        person.expect("> ")
        person.type(CTRL_C)
        person.expect("(Ctrl-C again, Ctrl-D or /quit leaves)")
        person.expect("> ")
        person.line("/system")
        person.expect("(no system prompt)")
        person.expect("> ")
        person.type(CTRL_C)
        person.expect("leaves)")
        person.expect("> ")
        person.type(CTRL_C)
        assert person.ends() == 0


def test_ctrl_c_twice_leaves_from_within_an_answer(herd: Gateway) -> None:
    with at_terminal(herd, "-i", "--model", "slow", "--max-tokens", "3000") as person:
        person.expect("> ")
        person.line("a long one")
        eventually(lambda: busy(herd) == 1)
        person.type(CTRL_C)
        person.expect("(stopped)")
        person.expect("> ")
        person.type(CTRL_C)
        assert person.ends() == 0


def busy(gateway: Gateway) -> int:
    return sum(slot["is_processing"] for slot in gateway.get("/upstream/slow/slots", key=ADMIN).json())


def test_ctrl_c_ends_a_one_shot(herd: Gateway) -> None:
    with at_terminal(herd, "--input", "a long one", "--model", "slow", "--max-tokens", "3000") as person:
        eventually(lambda: busy(herd) == 1)
        person.type(CTRL_C)
        assert person.ends() == 130
        assert "Traceback" not in person.shown
    eventually(lambda: busy(herd) == 0, 5)


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=["dumb", "no colour"])
def test_no_escape_codes_where_they_are_not_wanted(herd: Gateway, variables: dict[str, str]) -> None:
    with at_terminal(herd, "--max-tokens", "4", **variables) as person:
        person.expect("> ")
        person.line("hello")
        person.expect("(4 tokens, ")
        person.expect("> ")
        person.type(CTRL_D)
        assert person.ends() == 0
        assert "\x1b" not in person.shown


def test_a_gateway_that_is_away_does_not_end_a_talk(tmp_path: Path) -> None:
    with terminal(tmp_path, "chat", "--url", f"http://127.0.0.1:{free_port()}") as person:
        person.expect("> ")
        person.line("hello")
        person.expect("corral chat: no gateway at ")
        person.expect("> ")
        person.line("/history")
        person.expect("(nothing has been said)")
        person.type(CTRL_D)
        assert person.ends() == 0
