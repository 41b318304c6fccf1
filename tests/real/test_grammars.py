"""Named grammars before the real llama-server: what is stored, what a request gets, and what its parser dies of."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import anthropic
import gguf
import pytest

from gateway.errors import BadRequest
from gateway.models.parser import CPU_SECONDS, GrammarParser, Untested
from scripts import make_model
from tests.house import ADMIN, ROOT, USER, Gateway, eventually, llama_server, running_gateway, soon

pytestmark = pytest.mark.real

# As the one of llama.cpp, with bounds, so that a model that knows nothing comes to an end.
JSON = r"""
root   ::= object
value  ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" (string ":" member ("," string ":" member){0,2})? "}"
member ::= string | number | array | "true" | "null"
array  ::= "[" (number ("," number){0,3})? "]"
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" ["\\/bfnrt]){0,9} "\""
number ::= "-"? ("0" | [1-9] [0-9]{0,3}) ("." [0-9]{1,2})?
"""
ONLY = 'root ::= "<" [xyz]{3,5} ">"'
OBEYED = re.compile(r"<[xyz]{3,5}>")

MESSAGES = [{"role": "user", "content": "hi"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 200},
    "/v1/completions": {"prompt": "hi", "max_tokens": 200},
    "/completion": {"prompt": "hi", "n_predict": 200},
    "/infill": {"input_prefix": "a", "input_suffix": "b", "n_predict": 200},
    "/v1/responses": {"input": "hi", "max_output_tokens": 200},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 200},
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Its model can fill in."""
    path = tmp_path_factory.mktemp("models") / "infill.gguf"
    usual = make_model.add_vocabulary

    def with_infill(writer: gguf.GGUFWriter) -> None:
        usual(writer)
        for number, part in enumerate(("pre", "suf", "mid")):
            writer.add_uint32(f"tokenizer.ggml.fim_{part}_token_id", 10 + number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_model, "add_vocabulary", with_infill)
        make_model.make_model(path, seed=4)
    with running_gateway(tmp_path_factory.mktemp("gateway"), MODEL_PATH=str(path)) as running:
        for name, content in (("json", JSON), ("only", 'root ::= "first"'), ("only", ONLY)):
            assert store(running, name, content)["name"] == name
        yield running


def store(gateway: Gateway, name: str, content: str, status: int = 201) -> dict[str, Any]:
    reply = gateway.request("POST", "/grammars", {"name": name, "content": content}, key=ADMIN)
    assert reply.status == status, reply.body
    told: dict[str, Any] = reply.json()
    return told


def answered(path: str, body: bytes) -> str:
    """The text of an answer in one piece."""
    told = json.loads(body)
    if path == "/v1/responses":
        return str(told["output"][0]["content"][0]["text"])
    if path == "/v1/messages":
        return str(told["content"][0]["text"])
    if "content" in told:
        return str(told["content"])
    choice = told["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def streamed(path: str, body: bytes) -> str:
    """The text of a stream."""
    text = ""
    for line in body.splitlines():
        if not line.startswith(b"data: {"):
            continue
        told = json.loads(line[6:])
        if path == "/v1/responses":
            text += told["delta"] if told["type"] == "response.output_text.delta" else ""
        elif path == "/v1/messages":
            text += told["delta"].get("text", "") if "delta" in told else ""
        elif "content" in told:
            text += told["content"]
        else:
            for choice in told["choices"]:
                text += (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]
    return text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
def test_json_by_name_is_json(gateway: Gateway, path: str, stream: bool) -> None:
    seen = set()
    for seed in range(5):
        reply = gateway.request("POST", path, ROUTES[path] | {"grammar": "json", "seed": seed, "stream": stream})
        assert reply.status == 200, reply.body
        text = streamed(path, reply.body) if stream else answered(path, reply.body)
        assert isinstance(json.loads(text), dict)
        seen.add(text)
    assert len(seen) > 1, "it was the model that chose"


@pytest.mark.parametrize("path", ROUTES)
def test_a_version_by_its_number_the_newest_without(gateway: Gateway, path: str) -> None:
    texts = {}
    for name in ("only", "only@1", "only@2"):
        reply = gateway.request("POST", path, ROUTES[path] | {"grammar": name})
        assert reply.status == 200, reply.body
        texts[name] = answered(path, reply.body)
    assert texts["only@1"] == "first"
    assert OBEYED.fullmatch(texts["only"])
    assert OBEYED.fullmatch(texts["only@2"])


@pytest.mark.parametrize("name", ["nope", "only@3", "only@"])
@pytest.mark.parametrize("path", ROUTES)
def test_no_answer_without_the_grammar(gateway: Gateway, path: str, name: str) -> None:
    reply = gateway.request("POST", path, ROUTES[path] | {"grammar": name})
    error = reply.json()["error"]
    assert reply.status == 404
    if path == "/v1/messages":
        assert error["type"] == "not_found_error"
        assert "there is no" in error["message"]
    else:
        assert (error["code"], error["param"]) == ("grammar_not_found", "grammar")


@pytest.mark.parametrize("path", ROUTES)
def test_a_wrong_inline_one_is_llama_servers_to_refuse(gateway: Gateway, path: str) -> None:
    reply = gateway.request("POST", path, ROUTES[path] | {"grammar": 'root ::= "a" | nothing'})
    error = reply.json()["error"]
    assert (reply.status, error["type"]) == (400, "invalid_request_error")
    assert "failed to parse grammar" in error["message"]
    assert OBEYED.fullmatch(answered(path, gateway.request("POST", path, ROUTES[path] | {"grammar": ONLY}).body))


def test_every_answer_of_several_obeys(gateway: Gateway) -> None:
    chat = ROUTES["/v1/chat/completions"]
    told = gateway.request("POST", "/v1/chat/completions", chat | {"grammar": "only", "n": 2}).json()
    assert [bool(OBEYED.fullmatch(choice["message"]["content"])) for choice in told["choices"]] == [True, True]
    told = gateway.request("POST", "/completion", {"prompt": ["a", "b"], "n_predict": 50, "grammar": "only"}).json()
    assert [bool(OBEYED.fullmatch(answer["content"])) for answer in told] == [True, True]


def test_anthropics_client_gets_a_message_held_to_a_grammar(gateway: Gateway) -> None:
    turns: Any = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    asked: dict[str, Any] = {"model": "claude", "max_tokens": 100, "system": "be brief", "messages": turns}
    with anthropic.Anthropic(api_key=ADMIN, base_url=gateway.url, max_retries=0) as client:
        told = client.messages.create(**asked, extra_body={"grammar": "only"})
        assert isinstance(told.content[0], anthropic.types.TextBlock)
        assert OBEYED.fullmatch(told.content[0].text)
        assert (told.stop_reason, told.usage.input_tokens + (told.usage.cache_read_input_tokens or 0) > 5) == (
            "end_turn",
            True,
        )
        with client.messages.stream(**asked, extra_body={"grammar": "only"}) as stream:
            text = "".join(stream.text_stream)
            last = stream.get_final_message()
        assert OBEYED.fullmatch(text)
        assert (last.content[0].to_dict()["text"], last.stop_reason) == (text, "end_turn")
        assert last.usage.output_tokens > 1
        with pytest.raises(anthropic.BadRequestError, match="exclude each other"):
            client.messages.create(**asked, tools=[{"name": "f", "input_schema": {}}], extra_body={"grammar": "only"})


def test_the_plain_forms_too(gateway: Gateway) -> None:
    told = gateway.request(
        "POST", "/infer", {"prompt": "hi", "stream": False, "grammar": "only", "max_tokens": 50}
    ).json()
    assert OBEYED.fullmatch(told["content"])
    told = gateway.request("POST", "/v1/completions", {"input": "hi", "params": {"grammar": "only@1"}}).json()
    assert told["text"] == "first"
    assert gateway.request("POST", "/infer", {"prompt": "hi", "grammar": "nope"}).status == 404


def test_beside_tools_it_is_refused(gateway: Gateway) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    reply = gateway.chat(grammar="only", tools=tools)
    assert (reply.status, reply.json()["error"]["code"]) == (400, "invalid_request")


# --- the routes


def test_a_grammars_life(gateway: Gateway) -> None:
    def ask(method: str, path: str, body: Any = None, key: str = ADMIN) -> tuple[int, Any]:
        reply = gateway.request(method, path, body, key=key)
        return reply.status, reply.json() if reply.body else None

    status, made = ask("POST", "/grammars", {"name": "life", "description": "d", "content": 'root ::= "1"'})
    assert (status, made["version"], made["description"], made["content"]) == (201, 1, "d", 'root ::= "1"')
    status, made = ask("PUT", "/grammars/life", {"content": 'root ::= "2"'})
    assert (status, made["version"], made["description"]) == (200, 2, "d")
    assert gateway.chat(grammar="life", key=ADMIN).json()["choices"][0]["message"]["content"] == "2"
    status, told = ask("GET", "/grammars/life@1")
    assert (status, told["content"], told["version"], told["uses"]) == (200, 'root ::= "1"', 1, 1)
    assert [(each["version"], each["uses"]) for each in told["versions"]] == [(1, 0), (2, 1)]
    listed = {row["name"]: row for row in ask("GET", "/grammars")[1]["grammars"]}
    assert listed["life"] == {name: value for name, value in told.items() if name != "content"} | {"version": 2}
    assert ask("DELETE", "/grammars/life@2") == (204, None)
    assert ask("GET", "/grammars/life")[1]["content"] == 'root ::= "1"'
    assert ask("DELETE", "/grammars/life") == (204, None)
    for method, body in (("GET", None), ("PUT", {"content": 'root ::= "3"'}), ("DELETE", None)):
        status, told = ask(method, "/grammars/life", body)
        assert (status, told["error"]["code"]) == (404, "grammar_not_found")
    assert gateway.chat(grammar="life@1", key=ADMIN).status == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/grammars", {"content": ONLY}, "name"),
        ("POST", "/grammars", {"name": "x"}, "content"),
        ("POST", "/grammars", {"name": "x", "content": ""}, "content"),
        ("POST", "/grammars", {"name": "x", "content": 5}, "content"),
        ("POST", "/grammars", {"name": "x", "content": "hello"}, "content"),
        ("POST", "/grammars", {"name": "../x", "content": ONLY}, "name"),
        ("POST", "/grammars", {"name": "x", "content": ONLY, "description": 5}, "description"),
        ("POST", "/grammars", [], None),
        ("PUT", "/grammars/only", {"name": "other", "content": ONLY}, "name"),
        ("PUT", "/grammars/only@1", {"content": ONLY}, "name"),
        ("POST", "/grammars", {"name": "x", "content": 'root ::= "a"{1001}'}, "content"),
    ],
)
def test_what_is_wrong_in_a_write(gateway: Gateway, method: str, path: str, body: Any, param: str | None) -> None:
    reply = gateway.request(method, path, body, key=ADMIN)
    error = reply.json()["error"]
    assert (reply.status, error["code"], error["param"]) == (400, "invalid_request", param), error


def test_readers_do_not_write(gateway: Gateway) -> None:
    for method, path in (("POST", "/grammars"), ("PUT", "/grammars/only"), ("DELETE", "/grammars/only")):
        reply = gateway.request(method, path, {"name": "only", "content": ONLY})
        assert (reply.status, reply.json()["error"]["code"]) == (403, "insufficient_scope")
        assert gateway.request(method, path, {}, key=None).status == 401
    assert gateway.get("/grammars/only").status == gateway.get("/grammars").status == 200
    assert "problems" not in gateway.get("/grammars").json()
    assert gateway.request("PATCH", "/grammars/only", {}).headers["allow"] == "DELETE, GET, HEAD, PUT"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("root ::= (", "expecting ')' at the end"),
        ('root ::= "a" nothing', "Undefined rule identifier 'nothing'"),
        ('root ::= root "a" | "b"', "to themselves, without end"),
        ('other ::= "a"', "no rule named root"),
        ('root ::= "a', "unexpected end of input"),
        ("root ::= [z-a]", "nothing at all may follow"),
    ],
)
def test_the_parsers_message(gateway: Gateway, content: str, told: str) -> None:
    error = store(gateway, "wrong", content, 400)["error"]
    assert told in error["message"]
    assert gateway.get("/grammars/wrong").status == 404


def test_a_file_put_into_the_folder_is_found_and_a_broken_one_told(gateway: Gateway) -> None:
    folder = gateway.data_dir / "grammars"
    (folder / "mine.gbnf").write_text('root ::= "mine"\r\n')
    (folder / "broken.gbnf").write_text("root ::= mine")
    eventually(lambda: gateway.get("/grammars/mine").status == 200)
    assert gateway.chat(grammar="mine").json()["choices"][0]["message"]["content"] == "mine"
    told = gateway.request("POST", "/reload", {}, key=ADMIN).json()["grammars"]
    assert told["loaded"] >= 3
    assert "Undefined rule identifier 'mine'" in told["problems"][0]
    assert gateway.get("/grammars", key=ADMIN).json()["problems"] == told["problems"]
    assert gateway.chat(grammar="broken").status == 404


def test_the_page_for_users_says_what_works(gateway: Gateway, tmp_path: Path) -> None:
    script = re.search(r"```bash\n(.*?)```", (ROOT / "docs/GRAMMARS.md").read_text(), re.DOTALL)
    assert script
    text = re.sub(r"http://127.0.0.1:8000", gateway.url, script[1]).replace("sk-…", ADMIN)
    done = subprocess.run(["bash", "-euc", text], cwd=tmp_path, capture_output=True, text=True, timeout=9)
    assert done.returncode == 0, done.stderr
    stored, answer = done.stdout.replace("}{", "}\n{").splitlines()
    assert json.loads(stored)["version"] == 1
    person = json.loads(json.loads(answer)["choices"][0]["message"]["content"])
    assert list(person) == ["name", "age"]


@pytest.mark.timeout(30)
def test_what_was_stored_outlives_a_restart(tmp_path: Path, chat_model: Path) -> None:
    for turn in (1, 2):
        with running_gateway(tmp_path, MODEL_PATH=str(chat_model)) as gateway:
            gateway.wait_ready()
            if turn == 1:
                store(gateway, "only", ONLY)
            assert OBEYED.fullmatch(gateway.chat(grammar="only").json()["choices"][0]["message"]["content"])
            assert gateway.get("/grammars/only").json()["uses"] == turn
            assert gateway.stop() == 0


def test_without_a_llama_server_of_our_own_the_bounds_decide(gateway: Gateway, tmp_path: Path) -> None:
    path = os.pathsep.join(
        part for part in os.environ["PATH"].split(os.pathsep) if not Path(part, "llama-server").exists()
    )
    key = tmp_path / "key"
    key.write_text(USER)
    remote_is = {"LLAMA_URL": gateway.url, "LLAMA_API_KEY_FILE": str(key), "PATH": path, "LLAMA_SERVER_PATH": ""}
    with running_gateway(tmp_path, remote_is, API_KEY=ADMIN) as remote:
        assert store(remote, "fine", "root ::= nothing")["version"] == 1
        assert store(remote, "wide", 'root ::= "a"{1001}', 400)["error"]["param"] == "content"


# --- inline ones that lead back to themselves

# As they lie in llama.cpp's folder grammars/.
RECURSIVE = {
    "json": r"""root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws

# Optional space: by convention, applied in this grammar after literal chars when allowed
ws ::= | " " | "\n" [ \t]{0,20}
""",
    "arithmetic": r"""root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
""",
    "c": r"""root ::= (declaration)*

declaration ::= dataType identifier "(" parameter? ")" "{" statement* "}"

dataType  ::= "int" ws | "float" ws | "char" ws
identifier ::= [a-zA-Z_] [a-zA-Z_0-9]*

parameter ::= dataType identifier

statement ::=
    ( dataType identifier ws "=" ws expression ";" ) |
    ( identifier ws "=" ws expression ";" ) |
    ( identifier ws "(" argList? ")" ";" ) |
    ( "return" ws expression ";" ) |
    ( "while" "(" condition ")" "{" statement* "}" ) |
    ( "for" "(" forInit ";" ws condition ";" ws forUpdate ")" "{" statement* "}" ) |
    ( "if" "(" condition ")" "{" statement* "}" ("else" "{" statement* "}")? ) |
    ( singleLineComment ) |
    ( multiLineComment )

forInit ::= dataType identifier ws "=" ws expression | identifier ws "=" ws expression
forUpdate ::= identifier ws "=" ws expression

condition ::= expression relationOperator expression
relationOperator ::= ("<=" | "<" | "==" | "!=" | ">=" | ">")

expression ::= term (("+" | "-") term)*
term ::= factor(("*" | "/") factor)*

factor ::= identifier | number | unaryTerm | funcCall | parenExpression
unaryTerm ::= "-" factor
funcCall ::= identifier "(" argList? ")"
parenExpression ::= "(" ws expression ws ")"

argList ::= expression ("," ws expression)*

number ::= [0-9]+

singleLineComment ::= "//" [^\n]* "\n"
multiLineComment ::= "/*" ( [^*] | ("*" [^/]) )* "*/"

ws ::= ([ \t\n]+)
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
            assert gateway.chat(grammar="only").status == 200
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
