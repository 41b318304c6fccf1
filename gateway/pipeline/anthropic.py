"""Anthropic's messages as OpenAI's chat and back, for what llama-server itself ignores on `/v1/messages`: what rules an
answer, a grammar or a JSON schema.

Only text comes back: beside either of them there are no tools, and no thinking aloud. What a model thinks before an
answer that a schema rules is left out; a grammar rules the thoughts too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from gateway.errors import BadRequest
from gateway.pipeline.bounds import check_schema
from gateway.pipeline.call import Call, Fields, Route, typed_field
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.plain import Told
from gateway.pipeline.usage import Usage

_ABSENT = (b"null", b'""', b"[]", b"{}")
_TRANSLATED = frozenset({"system", "messages", "stop_sequences"})
_MEANINGLESS = frozenset({"tools", "tool_choice", "thinking", "metadata", "output_config", "output_format"})
_STOP_REASONS = {"length": "max_tokens"}


class _Format(msgspec.Struct):
    type: str
    schema: dict[str, msgspec.Raw]


_format = msgspec.json.Decoder(_Format)


def become_chat(call: Call, rules: list[str]) -> None:
    """`call`, in Anthropic's words, becomes the chat that it amounts to; `rules` are those that `rules_of` found.

    Raises BadRequest.
    """
    fields = call.fields
    tools = fields.get("tools")
    excluded = [*rules, "tools"] if tools is not None and bytes(tools) not in _ABSENT else rules
    if len(excluded) > 1:
        raise BadRequest(f"{' and '.join(excluded[:2])} exclude each other: send one of them", param=excluded[0])
    turns = typed_field(fields, "messages", list[dict[str, Any]], "a list of objects")
    chat: dict[str, Any] = {"messages": [*_system(fields), *_turns(turns or [])]}
    if rules == ["grammar"]:
        chat["reasoning_format"] = "none"
    else:  # with that, a template that begins with a thought makes llama-server refuse the schema
        chat["response_format"] = _response_format(fields, rules[0])
        thinking = typed_field(fields, "thinking", dict[str, Any], "an object") or {}
        if type(budget := thinking.get("budget_tokens")) is int:
            chat["thinking_budget_tokens"] = budget
    if "stop_sequences" in fields:
        chat["stop"] = typed_field(fields, "stop_sequences", list[str], "a list of strings")
    call.route = Route(call.route.template, "/v1/chat/completions", Dialect.CHAT)
    call.fields = {name: value for name, value in fields.items() if name not in _TRANSLATED | _MEANINGLESS}
    call.fields |= {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in chat.items()}


def _response_format(fields: Fields, name: str) -> msgspec.Raw:
    """Chat's form of a schema, within the bounds that it meets there. Raises BadRequest."""
    holder = msgspec.json.decode(fields["output_config"], type=Fields) if "." in name else fields
    raw = holder[name.rpartition(".")[2]]
    try:
        asked = _format.decode(raw)
    except msgspec.DecodeError as error:
        raise BadRequest(f'{name} must be {{"type": "json_schema", "schema": {{…}}}}: {error}', param=name) from None
    if asked.type != "json_schema":
        raise BadRequest(f"{name}.type is {asked.type[:40]!r}: must be json_schema", param=f"{name}.type")
    schema = {"name": "answer", "strict": True, "schema": asked.schema}
    encoded = msgspec.json.encode({"type": "json_schema", "json_schema": schema})
    check_schema(encoded, name)  # here, so that it is told by the name under which the client knows it
    return msgspec.Raw(encoded)


def _system(fields: Fields) -> Iterator[dict[str, Any]]:
    if "system" not in fields:
        return
    said = typed_field(fields, "system", object, "a string or a list of texts")
    if said:
        yield {"role": "system", "content": said if isinstance(said, str) else _joined(said, "system")}


def _turns(turns: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for index, turn in enumerate(turns):
        where = f"messages[{index}]"
        content = turn.get("content")
        if isinstance(content, str) or content is None or not isinstance(turn.get("role"), str):
            yield turn  # what is wrong with it, the shield tells
        elif not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
            raise BadRequest(f"{where}.content must be a string or a list of objects", param=f"{where}.content")
        elif turn["role"] == "assistant":
            yield _said(content, where)
        else:
            yield from _asked(turn["role"], content, where)


def _asked(role: str, blocks: list[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.get("type")
        if kind == "tool_result":
            told = block.get("content") or ""
            text = told if isinstance(told, str) else _joined(told, where)
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id", ""), "content": text}
        elif kind == "text":
            parts.append({"type": "text", "text": _text_of(block, where)})
        elif kind == "image":
            parts.append({"type": "image_url", "image_url": {"url": _url_of(block, where)}})
        else:
            said = f"{where} holds {str(kind)[:40]!r}, which goes with neither a grammar nor a schema"
            raise BadRequest(said, param=where)
    if parts:
        yield {"role": role, "content": parts}


def _said(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    calls = [
        {
            "id": block.get("id", ""),
            "type": "function",
            "function": {
                "name": block.get("name", ""),
                "arguments": msgspec.json.encode(block.get("input") or {}).decode(),
            },
        }
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    text = _joined([block for block in blocks if block.get("type") == "text"], where)
    return {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})


def _joined(blocks: Any, where: str) -> str:
    if not isinstance(blocks, list):
        raise BadRequest(f"{where}: a content must be a string or a list of texts", param=where)
    return "".join(_text_of(block, where) for block in blocks)


def _text_of(block: Any, where: str) -> str:
    text = block.get("text") if isinstance(block, dict) else None
    if not isinstance(text, str):
        raise BadRequest(f"{where}: a block of text has no text", param=where)
    return text


def _url_of(block: dict[str, Any], where: str) -> str:
    source = block.get("source")
    if isinstance(source, dict) and isinstance(source.get("url"), str):
        return str(source["url"])
    if isinstance(source, dict) and isinstance(source.get("data"), str):
        return f"data:{source.get('media_type', 'image/jpeg')};base64,{source['data']}"
    raise BadRequest(f"{where}: an image has no source with data or a url", param=where)


# --- answers


def message_start(message_id: str, model: str) -> dict[str, Any]:
    usage = {"input_tokens": 0, "output_tokens": 0, "cache_read_input_tokens": 0}  # known at the end
    return {"type": "message_start", "message": _message(message_id, model) | {"content": [], "usage": usage}}


def text_delta(text: str) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}


def block_start() -> dict[str, Any]:
    return {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}


def endings(told: Told, usage: Usage) -> list[dict[str, Any]]:
    """The last events of a stream."""
    end = {"stop_reason": _stop_reason(told), "stop_sequence": None}
    return [
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": end, "usage": _usage(usage)},
        {"type": "message_stop"},
    ]


def message(message_id: str, model: str, told: Told, usage: Usage) -> dict[str, Any]:
    """A whole answer."""
    content = [{"type": "text", "text": told.text}]
    ended = {"stop_reason": _stop_reason(told), "usage": _usage(usage)}
    return _message(message_id, model) | {"content": content} | ended


def _message(message_id: str, model: str) -> dict[str, Any]:
    about = {"id": message_id, "type": "message", "role": "assistant", "model": model}
    return about | {"stop_reason": None, "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, int]:
    fresh = usage.prompt - usage.cached
    return {
        "cache_read_input_tokens": usage.cached,
        "input_tokens": fresh,
        "output_tokens": usage.completion,
    }


def _stop_reason(told: Told) -> str:
    return _STOP_REASONS.get(told.finish_reason or "", "end_turn")
