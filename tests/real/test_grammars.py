"""Named grammars before the real llama-server: what is stored, what a request gets."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import gguf
import pytest

from scripts import make_model
from tests.house import ADMIN, ROOT, USER, Gateway, eventually, running_gateway
from tests.real.grammar_kit import JSON, OBEYED, ONLY, ROUTES

pytestmark = pytest.mark.real


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
