"""Assemblers of OpenAI's older dialects, chat and completions: choices by index, then `[DONE]`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.pipeline.assemblers.base import Assembler, merge
from gateway.pipeline.usage import Usage

_PER_CHUNK = frozenset({"choices", "usage", "timings", "object", "prompt_progress"})


class _Choice:
    """What is known of one choice."""

    __slots__ = ("extra", "final", "finish_reason", "logprobs", "message", "reasoning", "text", "tool_calls")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.tool_calls: list[dict[str, Any]] = []
        self.message: dict[str, Any] = {}  # other fields of the deltas
        self.extra: dict[str, Any] = {}  # other fields of the choice
        self.logprobs: Any = None
        self.finish_reason: str | None = None
        self.final: dict[str, Any] = {}  # usage and timings


class _Choices(Assembler):
    """The common part: which chunk belongs to which choice, and what stands around them."""

    object_name = ""

    def __init__(self, request: Mapping[str, Any]) -> None:
        super().__init__(request)
        self._choices: dict[int, _Choice] = {}
        self._around: dict[str, Any] = {}
        self._last = 0  # the choice that ended last: the usage chunk behind it, without choices, is its own

    @property
    def usage(self) -> Usage:
        return sum((Usage.of_final(choice.final) for choice in self._choices.values()), Usage())

    def _choice(self, index: int) -> _Choice:
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice()
        return choice

    def _take_any(self, data: bytes) -> None:
        chunk = self._decode(data)
        if chunk is None:
            return
        self._around |= {name: value for name, value in chunk.items() if name not in _PER_CHUNK}
        for told in chunk.get("choices") or ():
            index = told.get("index", 0)
            choice = self._choice(index)
            self._take_choice(choice, told)
            if told.get("logprobs") is not None:
                choice.logprobs = merge(choice.logprobs, told["logprobs"])
            if told.get("finish_reason"):
                choice.finish_reason = told["finish_reason"]
                self._last = index
        final = {name: chunk[name] for name in ("usage", "timings") if chunk.get(name)}
        if final and "prompt_progress" not in chunk:
            self._choice(self._last).final |= final

    @abstractmethod
    def _take_choice(self, choice: _Choice, told: dict[str, Any]) -> None: ...

    def _result(self) -> dict[str, Any]:
        ordered = sorted(self._choices.items())
        # As llama-server does: the choices of all, the rest of the first.
        final = next((choice.final for _, choice in ordered if choice.final), {})
        around = self._around
        result: dict[str, Any] = {"choices": [self._finished(index, choice) for index, choice in ordered]}
        result |= {name: around[name] for name in ("created", "model", "system_fingerprint") if name in around}
        result["object"] = self.object_name
        if final:
            result["usage"] = final.get("usage") or _usage_object(Usage.of_final(final))
        result |= {name: value for name, value in around.items() if name not in result}
        if "timings" in final:
            result["timings"] = final["timings"]
        return result

    @abstractmethod
    def _finished(self, index: int, choice: _Choice) -> dict[str, Any]: ...


class Chat(_Choices):
    object_name = "chat.completion"

    def _take(self, event: str | None, data: bytes) -> None:
        try:
            told = _chat_token.decode(data).choices[0]
        except (msgspec.ValidationError, IndexError):
            self._take_any(data)
            return
        choice = self._choice(told.index)
        if told.delta.content:
            choice.text.append(told.delta.content)
        if told.delta.reasoning_content:
            choice.reasoning.append(told.delta.reasoning_content)

    def _take_choice(self, choice: _Choice, told: dict[str, Any]) -> None:
        for name, value in (told.get("delta") or {}).items():
            if name == "content":
                choice.text.append(value or "")
            elif name == "reasoning_content":
                choice.reasoning.append(value or "")
            elif name == "tool_calls":
                for call in value or ():
                    _add_call(choice.tool_calls, call)
            elif name == "role":
                choice.message["role"] = value
            else:
                choice.message[name] = merge(choice.message.get(name), value)
        for name, value in told.items():
            if name not in ("index", "delta", "logprobs", "finish_reason") and value is not None:
                choice.extra[name] = value

    def _finished(self, index: int, choice: _Choice) -> dict[str, Any]:
        # content is "" beside tool calls and in an answer that is all reasoning, not null
        message: dict[str, Any] = {"role": "assistant", "content": "".join(choice.text), **choice.message}
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.tool_calls:
            message["tool_calls"] = choice.tool_calls
        finished = {"finish_reason": choice.finish_reason, "index": index, "message": message, **choice.extra}
        if choice.logprobs is not None:
            finished["logprobs"] = choice.logprobs
        return finished


class Completions(_Choices):
    object_name = "text_completion"

    def _take(self, event: str | None, data: bytes) -> None:
        try:
            told = _text_token.decode(data).choices[0]
        except (msgspec.ValidationError, IndexError):
            self._take_any(data)
            return
        self._choice(told.index).text.append(told.text)

    def _take_choice(self, choice: _Choice, told: dict[str, Any]) -> None:
        choice.text.append(told.get("text") or "")
        for name, value in told.items():
            if name not in ("index", "text", "logprobs", "finish_reason") and value is not None:
                choice.extra[name] = value

    def _finished(self, index: int, choice: _Choice) -> dict[str, Any]:
        return {
            "text": "".join(choice.text),
            "index": index,
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish_reason,
            **choice.extra,
        }


def _add_call(calls: list[dict[str, Any]], told: dict[str, Any]) -> None:
    """A tool call's delta: arguments come in pieces, all else whole, and some servers repeat it in every piece."""
    index = told.get("index", 0)
    while len(calls) <= index:
        if len(calls) > 4096:
            raise LookupError(f"tool call {index}")
        calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[index]
    for name, value in told.items():
        if name == "function" and isinstance(value, dict):
            function = call["function"]
            function["name"] = value.get("name") or function["name"]
            function["arguments"] += value.get("arguments") or ""
        elif name != "index" and value is not None:
            call[name] = value


def _usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "completion_tokens": usage.completion,
        "prompt_tokens": usage.prompt,
        "total_tokens": usage.completion + usage.prompt,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


# The chunk of an ordinary token, which nearly all are. One with any other field, or with a field filled that is null
# here, does not fit and is decoded as it comes.


class _Delta(msgspec.Struct, forbid_unknown_fields=True):
    content: str | None = None
    reasoning_content: str | None = None


class _ChatChoice(msgspec.Struct, forbid_unknown_fields=True):
    delta: _Delta
    index: int = 0
    finish_reason: None = None
    logprobs: None = None


class _TextChoice(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    index: int = 0
    finish_reason: None = None
    logprobs: None = None


class _Chunk(msgspec.Struct, forbid_unknown_fields=True):
    id: str = ""
    object: str = ""
    created: int = 0
    model: str = ""
    system_fingerprint: str | None = None


class _ChatChunk(_Chunk, forbid_unknown_fields=True, kw_only=True):
    choices: tuple[_ChatChoice]


class _TextChunk(_Chunk, forbid_unknown_fields=True, kw_only=True):
    choices: tuple[_TextChoice]


_chat_token = msgspec.json.Decoder(_ChatChunk)
_text_token = msgspec.json.Decoder(_TextChunk)
