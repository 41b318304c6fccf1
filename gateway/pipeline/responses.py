"""What OpenAI's responses ask for in words of their own, and llama-server does not read."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.errors import BadRequest
from gateway.pipeline.call import Fields, typed_field

_items = msgspec.json.Decoder(list[dict[str, Any]])


def check_responses(fields: Fields) -> None:
    """An empty input is answered by llama-server with words. Raises BadRequest."""
    given = bytes(fields.get("input", b""))
    if given.startswith(b"[") and not given.strip(b"[] \n\r\t"):
        raise BadRequest("input is empty: it must hold at least one item", param="input")
    if given.startswith(b"[") and b'"assistant"' in given:
        spell_out_answers(fields)
    if "text" in fields:
        hold_to_format(fields)


def spell_out_answers(fields: Fields) -> None:
    """The model's earlier answers in the long form: llama-server (build 11669) refuses the short one."""
    try:
        items = _items.decode(fields["input"])
    except msgspec.DecodeError:
        return  # llama-server says what is wrong with it
    for number, item in enumerate(items):
        if item.get("role") == "assistant" and item.get("type", "message") == "message":
            usual = {"type": "message", "status": "completed", "id": f"msg_{number}"}
            items[number] = item = usual | {name: value for name, value in item.items() if value is not None}
            if isinstance(item.get("content"), str):
                item["content"] = [{"type": "output_text", "text": item["content"]}]
    fields["input"] = msgspec.Raw(msgspec.json.encode(items))


def hold_to_format(fields: Fields) -> None:
    """`text.format` under the name that llama-server knows, unless the request uses that itself. Raises BadRequest.

    Seen on build 11669: by itself it reads `text` not at all, and answers freely.
    """
    text = typed_field(fields, "text", dict[str, msgspec.Raw], "an object")
    if not text or "format" not in text or "response_format" in fields:
        return
    wanted = typed_field(text, "format", dict[str, Any], "an object")
    if wanted is None or wanted.get("type") in (None, "text"):
        return
    if wanted["type"] == "json_schema":
        if not isinstance(wanted.get("schema"), dict):
            raise BadRequest("text.format.schema must be an object", param="text.format.schema")
        wanted = {"type": "json_schema", "json_schema": {name: wanted[name] for name in wanted if name != "type"}}
    fields["response_format"] = msgspec.Raw(msgspec.json.encode(wanted))
