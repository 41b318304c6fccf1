"""Grammars that llama-server's parser is asked about in a throw-away process: what it takes, and what it dies of."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from gateway.errors import BadRequest
from gateway.models.parser import CPU_SECONDS, GrammarParser, Untested
from tests.house import Gateway, eventually, llama_server, soon
from tests.real.grammar_kit import JSON, ONLY, ROUTES

pytestmark = pytest.mark.real

# Of the kinds that people write: each leads back to itself, and has one way on at each place.
RECURSIVE = {
    "json": r"""
root   ::= value
value  ::= "{" blank (member ("," blank member)*)? "}" blank | "[" blank (value ("," blank value)*)? "]" blank | plain
member ::= text ":" blank value
plain  ::= (text | number | "true" | "false" | "null") blank
text   ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" ["\\/bfnrt])* "\"" blank
number ::= "-"? [0-9]{1,15} ("." [0-9]+)?
blank  ::= [ \n]{0,4}
""",
    "sums": 'root ::= (sum "=" [0-9]+ "\\n")+\nsum ::= term ([-+*/] term)*\nterm ::= [a-z] [a-z0-9]* | "(" sum ")"',
    "statements": r"""
root  ::= block
block ::= "{" line* "}"
line  ::= "while (" name " < " [0-9]+ ") " block | name " = " value ";" | "return " value ";"
value ::= name | [0-9]+ | "-" value | "(" value [+*] value ")"
name  ::= [a-z] [a-z0-9_]{0,7}
""",
    "a list": 'root ::= "a" root | "b"',
}
TWOFOLD = 'root ::= "a" root "b" | "a" root "c"'
NESTING = {
    "without end": TWOFOLD,
    "out of many": f'{TWOFOLD} | "d" | "e" | "f" | "g"',
    "forty rules": "root ::= r0\nr40 ::= []\n"
    + "".join(f'r{i} ::= "a" r{i + 1} "b" | "a" r{i + 1} "c"\n' for i in range(40)),
}


@pytest.mark.parametrize("kind", RECURSIVE)
def test_usual_grammars_that_lead_back_to_themselves_pass(gateway: Gateway, kind: str) -> None:
    for path in ("/v1/completions", "/v1/messages"):
        reply = gateway.request("POST", path, ROUTES[path] | {"grammar": RECURSIVE[kind], "max_tokens": 20})
        assert reply.status == 200, reply.body
    begun = time.monotonic()
    assert gateway.chat(grammar=RECURSIVE[kind]).status == 200
    assert time.monotonic() - begun < 1, "that it passed is remembered"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", NESTING)
def test_one_that_doubles_with_every_token_keeps_no_model_busy(gateway: Gateway, kind: str) -> None:
    before, asked = gateway.model()["pid"], {"prompt": "hi", "max_tokens": 200, "grammar": NESTING[kind]}
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(gateway.request, "POST", "/v1/completions", asked, seconds=50)
        while not refused.done():
            assert gateway.slots_busy() == 0
            assert gateway.chat().status == 200
            wait([refused], timeout=0.1)
    for reply in (refused.result(), gateway.request("POST", "/v1/completions", asked)):
        error = reply.json()["error"]
        assert (reply.status, error["code"], error["param"]) == (400, "invalid_request", "grammar")
        assert "busy" in error["message"]
    assert gateway.model()["pid"] == before


@pytest.mark.timeout(60)
async def test_who_sends_many_that_take_long_keeps_no_others_waiting() -> None:
    parser = GrammarParser(llama_server(), {"PATH": os.environ["PATH"]})
    slow = [asyncio.create_task(parser.test(f"{TWOFOLD} # {number}", "bob")) for number in range(5)]
    await soon(lambda: len(parsers()) == 1)
    await parser.test(ONLY, "alice")
    assert not any(task.done() for task in slow)
    assert len(parsers()) == 1, "his take turns"
    for task in slow:
        task.cancel()
    await asyncio.wait(slow)
    assert parsers() == []
    await parser.test(ONLY + " # again", "bob")


def test_who_leaves_while_it_is_tried_leaves_nothing_behind(gateway: Gateway) -> None:
    with pytest.raises(TimeoutError):
        gateway.request("POST", "/v1/completions", {"prompt": "hi", "grammar": f"{TWOFOLD} # left"}, seconds=1)
    eventually(lambda: not parsers(gateway.process.pid))
    assert gateway.get("/health", key=None).json()["queue"]["active"] == 0


def test_who_waits_no_longer_than_so_is_told(gateway: Gateway) -> None:
    reply = gateway.request(
        "POST",
        "/v1/completions",
        {"prompt": "hi", "grammar": f"{TWOFOLD} # hurry"},
        headers={"X-Request-Timeout": "1"},
    )
    assert (reply.status, reply.json()["error"]["code"]) == (503, "queue_timeout")
    assert parsers(gateway.process.pid) == []


# --- what the parser dies of

NESTED = "root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000
HOSTILE = {
    "crashes": (NESTED, "SIGSEGV"),
    "takes all memory": ('root ::= "a"{5,2}', "too much memory"),
    "takes for ever": ("root ::= " + '"a"? ' * 8000, f"more than {CPU_SECONDS} s"),
}


def parsers(parent_pid: int | None = None) -> list[int]:
    """The throw-away processes of this one, or of a gateway."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == (parent_pid or os.getpid()) and b"/corral-" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


@pytest.mark.timeout(40)
@pytest.mark.parametrize("kind", HOSTILE)
async def test_the_serving_model_notices_nothing(gateway: Gateway, kind: str) -> None:
    """The bounds would refuse these before the parser saw them; here it gets them all the same."""
    text, told = HOSTILE[kind]
    parser = GrammarParser(llama_server(), {"PATH": os.environ["PATH"]})
    before, slowest, done = gateway.model()["pid"], [0.0], threading.Event()

    def serve() -> int:
        answers = 0
        while not done.is_set() or not answers:
            begun = time.monotonic()
            assert gateway.chat(grammar=ONLY).status == 200
            slowest[0] = max(slowest[0], time.monotonic() - begun)
            answers += 1
            done.wait(0.05)  # the machine is not to be filled by this
        return answers

    serving = asyncio.create_task(asyncio.to_thread(serve))
    try:
        with pytest.raises(BadRequest, match=told):
            await parser.test(text)
        begun = time.monotonic()
        with pytest.raises(BadRequest, match=told):
            await parser.test(text)
        assert time.monotonic() - begun < 0.1, "the verdict is remembered"
    finally:
        done.set()
        answers = await serving
    assert answers > 0
    assert slowest[0] < 3, "a loaded machine is no failure, a blocked model is"
    assert gateway.model()["pid"] == before
    assert parsers() == []


async def test_what_the_real_parser_takes() -> None:
    parser = GrammarParser(llama_server(), {"PATH": os.environ["PATH"]})
    for text in (
        JSON,
        ONLY,
        "# c ::= d\nroot ::= [^a-z\\n]+ # x",
        'root ::= <think> "x" !<[5]>',
        "root ::= ",
        "root::=[\\u4e00-\\u9fff]*",
    ):
        await parser.test(text)
    assert parsers() == []


async def test_a_test_that_nobody_waits_for_leaves_no_process() -> None:
    parser = GrammarParser(llama_server(), {"PATH": os.environ["PATH"]})
    task = asyncio.create_task(parser.test(HOSTILE["takes for ever"][0]))
    await soon(lambda: bool(parsers()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert parsers() == []
    await parser.test(ONLY)


async def test_without_a_binary_everything_passes() -> None:
    for binary in (None, Path("/nowhere/llama-server")):
        await GrammarParser(binary, {"PATH": os.environ["PATH"]}).test("root ::= (")


@pytest.mark.parametrize("binary", ["/bin/false", "/bin/cat", "/etc/passwd"])
async def test_a_parser_that_cannot_be_asked_is_no_verdict(binary: str) -> None:
    parser = GrammarParser(Path(binary), {"PATH": os.environ["PATH"]})
    with pytest.raises(Untested, match="could not be tested"):
        await parser.test(ONLY)
