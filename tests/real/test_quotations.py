"""What clients send stands in no file unless AUDIT_CONTENT says so: llama-server quotes what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.house import ADMIN, Gateway, eventually, running_gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

MARK = "ZQXMARKZ"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMAS: list[Any] = [
    {"type": MARK},
    {"$ref": f"#/{MARK}"},
    {"type": "string", "pattern": f"{MARK}("},
    {"type": "string", "pattern": f"^{MARK}[$"},
    {"type": "string", "pattern": f"^(?=a\n{MARK})$"},
    {"allOf": [{"type": MARK}]},
]
TOOLS: list[Any] = [[{"type": MARK}], [{"type": "function", "function": MARK}], [{"name": MARK}], [MARK], MARK]
CALLS: list[Any] = [
    {"function": {"name": MARK, "arguments": {MARK: MARK}}},  # as in histories of Ollama
    {"type": MARK, "function": {"name": MARK}},
    {"type": "function", "function": {"nme": MARK}},
    {"type": "function", MARK: MARK},
    MARK,
]
GRAMMARS = [
    f"root ::= {MARK}",
    f'root ::= "{MARK}',
    f'root ::= (\n"{MARK}"\n\n{MARK}\n',
    f'root ::= "a" ::= \n# {MARK}',
    f'root ::= "\\x{MARK}"',
    f"root ::= <{MARK}>",
    f"E error parsing grammar: {MARK} ::=\nsrv {MARK}",
    "root ::= (\n" + f'"{MARK}" |\n' * 4000,  # more than is written at once
]


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": MARK}], "max_tokens": 4} | fields


def requests() -> Iterator[tuple[str, Any]]:
    for text in GRAMMARS:
        yield CHAT, chat(grammar=text)
        yield TEXT, {"prompt": MARK, "max_tokens": 4, "grammar": text}
    for schema in SCHEMAS:
        yield CHAT, chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}})
        yield TEXT, {"prompt": MARK, "max_tokens": 4, "json_schema": schema}
    for tools in TOOLS:
        yield CHAT, chat(tools=tools)
    for call in CALLS:
        history = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARK, "tool_calls": [call]}]
        yield CHAT, {"messages": history, "max_tokens": 4}
        yield "/apply-template", {"messages": history}
    for name in ("tool_choice", "reasoning_format", "response_format", "chat_template", "seed", "logit_bias", MARK):
        yield CHAT, chat(**{name: MARK if name != "response_format" else {"type": MARK}})
        yield "/completion", {"prompt": MARK, "n_predict": 4, name: MARK}
    for part in ({"type": MARK}, {"type": "text", MARK: MARK}, {"type": "image_url", "image_url": {"url": MARK}}, MARK):
        yield CHAT, {"messages": [{"role": "user", "content": [part]}], "max_tokens": 4}
    for role in (MARK, "tool"):
        yield CHAT, {"messages": [{"role": role, "content": {MARK: MARK}}], "max_tokens": 4}
    yield CHAT, chat(messages=[{"role": "user", "content": f"{MARK} " * 8000}])
    yield CHAT, f'{{"messages":[{{"role":"user","content":"{MARK}'.encode()
    yield "/v1/responses", {"input": MARK, "tools": [{"type": f"x\n{MARK}", "name": MARK}], "max_output_tokens": 4}
    yield "/v1/responses", {"input": MARK, "text": {"format": {"type": MARK}}, "max_output_tokens": 4}
    yield "/v1/messages", {"messages": [{"role": "user", "content": [{"type": MARK, "text": MARK}]}], "max_tokens": 4}
    yield "/infill", {"input_prefix": MARK, "input_suffix": 5, "input_extra": [MARK]}
    yield "/v1/embeddings", {"input": {MARK: MARK}}
    yield "/tokenize", {"content": [{MARK: MARK}]}
    yield f"{CHAT}?q={MARK}", chat()
    yield f"/v1/{MARK}", chat()
    yield CHAT, chat(model=MARK)
    yield "/v1/models/load", {"model": MARK}


def logged(gateway: Gateway) -> str:
    return "".join(path.read_text() for path in (gateway.data_dir / "logs").glob("*/*_server_*.log"))


@pytest.mark.parametrize("extra", ["", "-lv 4"])
def test_no_marker_in_any_file(tmp_path: Path, chat_model: Path, extra: str) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), EXTRA_ARGS=extra, LOG_LEVEL="debug") as gateway:
        for path, body in requests():
            gateway.request("POST", path, body, key=ADMIN, headers={"User-Agent": MARK})
        assert gateway.chat().status == 200
        assert gateway.stop() == 0
        text = logged(gateway)
        for told in (
            "got exception: [left out: code 500, type server_error]",
            "got exception: [left out: code 400, type invalid_request_error]",
            "parse: error parsing grammar: [left out]\n",
            "failed to parse grammar",
            "conversion was incomplete: [left out]\n",
            "print_timing",
        ):
            assert told in text
        found = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert {name for name, data in found.items() if MARK.encode() in data} == set()


def test_with_audit_content_full_it_stands_there_up_to_a_length(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), AUDIT_CONTENT="full") as gateway:
        call = {"function": {"arguments": MARK + "x" * 2_000_000, "name": "f"}}
        assert gateway.chat(messages=[{"role": "assistant", "content": "", "tool_calls": [call]}]).status == 400
        text = eventually(lambda: " bytes left out]" in logged(gateway) and logged(gateway))
        assert MARK in text
        assert max(map(len, text.splitlines())) < 5000
