"""Small streams in every dialect, in the words of llama-server build 11669."""

from __future__ import annotations

import json
from typing import Any

from gateway.pipeline.dialects import Dialect

DONE = b"data: [DONE]\n\n"
PIECES = ["Say ", 'it "so"', ".\n", "é漢", '"usage":{"prompt_tokens":99}', '"stop":true', "data: [DONE]"]
TEXT = "".join(PIECES)
PROMPT, CACHED = 22, 21
GENERATED = len(PIECES)
USAGE = {
    "completion_tokens": GENERATED,
    "prompt_tokens": PROMPT,
    "total_tokens": PROMPT + GENERATED,
    "prompt_tokens_details": {"cached_tokens": CACHED},
}
RESPONSES_USAGE = {
    "input_tokens": PROMPT,
    "output_tokens": GENERATED,
    "total_tokens": PROMPT + GENERATED,
    "input_tokens_details": {"cached_tokens": CACHED},
}
TIMINGS = {
    "cache_n": CACHED,
    "prompt_n": PROMPT - CACHED,
    "prompt_ms": 1.1,
    "prompt_per_token_ms": 0.05,
    "predicted_n": GENERATED,
    "predicted_ms": 0.7,
}
AROUND = {"created": 1795251074, "id": "chatcmpl-1", "model": "demo", "system_fingerprint": "b11669-Debian"}


def event(payload: Any, name: str | None = None) -> bytes:
    text = json.dumps(payload, separators=(",", ":"), ensure_ascii=False)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def chat_chunk(delta: dict[str, Any], index: int = 0, finish: str | None = None, **more: Any) -> bytes:
    choice = {"finish_reason": finish, "index": index, "delta": delta}
    return event({"choices": [choice], **AROUND, "object": "chat.completion.chunk", **more})


def chat(usage: bool = True, index: int = 0) -> list[bytes]:
    events = [chat_chunk({"role": "assistant", "content": None}, index)]
    events += [chat_chunk({"content": piece}, index) for piece in PIECES]
    if not usage:
        return [*events, chat_chunk({}, index, "stop", timings=TIMINGS), DONE]
    last = {"choices": [], **AROUND, "object": "chat.completion.chunk", "usage": USAGE, "timings": TIMINGS}
    return [*events, chat_chunk({}, index, "stop"), event(last), DONE]


def text_chunk(text: str, index: int = 0, finish: str | None = None, logprobs: Any = None, **more: Any) -> bytes:
    choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish}
    return event({"choices": [choice], **AROUND, "object": "text_completion", **more})


def completions(index: int = 0) -> list[bytes]:
    events = [text_chunk(piece, index) for piece in PIECES]
    return [*events, text_chunk("", index, "length", usage=USAGE, timings=TIMINGS), DONE]


def native_token(text: str, number: int, index: int = 0, **more: Any) -> bytes:
    told = {"index": index, "content": text, "tokens": [300 + number], "stop": False, "id_slot": -1}
    return event({**told, "tokens_predicted": number, "tokens_evaluated": PROMPT, **more})


def native_final(index: int = 0, prompt: str = "<s>a", **more: Any) -> bytes:
    told = {"index": index, "content": "", "tokens": [], "id_slot": 1, "stop": True, "model": "demo"}
    told |= {"tokens_predicted": GENERATED, "tokens_evaluated": PROMPT}
    told |= {"generation_settings": {"stop": [], "stream": True, "n_predict": 9}, "prompt": prompt}
    told |= {"truncated": False, "stop_type": "limit", "stopping_word": "", "tokens_cached": 28, "timings": TIMINGS}
    return event({**told, **more})


def native(index: int = 0, prompt: str = "<s>a") -> list[bytes]:
    return [*(native_token(piece, at + 1, index) for at, piece in enumerate(PIECES)), native_final(index, prompt)]


def responses(text: str = TEXT) -> list[bytes]:
    def named(name: str, **told: Any) -> bytes:
        return event({"type": name, **told}, name)

    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": text}
    item = {"type": "message", "status": "completed", "id": "msg_1", "content": [part], "role": "assistant"}
    thought = {"id": "rs_1", "summary": [], "type": "reasoning", "content": [], "encrypted_content": ""}
    begun = {"id": "resp_1", "object": "response", "status": "in_progress"}
    whole = {"id": "resp_1", "object": "response", "created_at": 5, "status": "completed", "model": "demo"}
    whole |= {"output": [thought, item], "usage": RESPONSES_USAGE}
    return [
        named("response.created", response=begun),
        named("response.in_progress", response=begun),
        named("response.output_item.added", item={"content": [], "id": "msg_1", "type": "message"}),
        named("response.content_part.added", item_id="msg_1", part={"type": "output_text", "text": ""}),
        *(named("response.output_text.delta", item_id="msg_1", delta=piece) for piece in PIECES),
        named("response.output_text.done", item_id="msg_1", text=text),
        named("response.output_item.done", item=item),
        named("response.completed", response=whole, timings=TIMINGS),
    ]


def messages() -> list[bytes]:
    def named(name: str, **told: Any) -> bytes:
        return event({"type": name, **told}, name)

    start: dict[str, Any] = {"id": "chatcmpl-1", "type": "message", "role": "assistant", "content": [], "model": "demo"}
    start |= {"stop_reason": None, "stop_sequence": None}
    start["usage"] = {"cache_read_input_tokens": CACHED, "input_tokens": PROMPT - CACHED, "output_tokens": 0}
    return [
        named("message_start", message=start),
        named("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *(named("content_block_delta", index=0, delta={"type": "text_delta", "text": piece}) for piece in PIECES),
        named("content_block_stop", index=0),
        named(
            "message_delta",
            delta={"stop_reason": "end_turn", "stop_sequence": None},
            usage={"output_tokens": GENERATED},
        ),
        named("message_stop"),
    ]


STREAMS = {
    Dialect.CHAT: chat(),
    Dialect.COMPLETIONS: completions(),
    Dialect.NATIVE: native(),
    Dialect.RESPONSES: responses(),
    Dialect.MESSAGES: messages(),
}
ERROR = {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}


def error(dialect: Dialect) -> bytes:
    """How llama-server itself puts an error into a stream; a clean end of the connection follows."""
    return event(ERROR, "error") if dialect is Dialect.MESSAGES else event({"error": ERROR})
